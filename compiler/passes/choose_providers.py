"""Choose who runs the fused operations."""

from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.ops import REFERENCE, Op


def choose_providers(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Replace every fused operation by the provider that takes it for the shapes, dtypes and device at hand.

    Before: `%maps = lowrank_delta(%x, ...)`. After, on a CPU where the C++ provider takes it:
    `%maps = torch.ops.stepgraph.lowrank_delta_cpu.default(%x, ...)`. The reference is a plain function, which torch.compile
    sees through; with `ctx.exact` nothing else is chosen.

    Raises:
        OpError: No provider takes an operation.
    """
    count = 0
    for node in gm.graph.nodes:
        op = node.target
        if isinstance(op, Op):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            provider = op.providers[REFERENCE] if ctx.exact else op.choose(*args, **kwargs)
            node.target = provider.run
            node.meta["provider"] = f"{op.name} by {provider.name}"
            count += 1
    return count
