"""Choose who runs the fused operations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.node_facts import PROVIDER, OpCall
from stepgraph.ops import REFERENCE, Op, Provider


def choose_references(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Replace every fused operation by its reference, which computes what the eager model does to the last bit.

    Before: `%maps = lowrank_delta(%x, ...)`. After: the same as a plain torch function.
    """
    return _replace(gm, lambda op, args, kwargs: op.providers[REFERENCE])


def choose_providers(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Replace every fused operation by the provider that takes it for the shapes, dtypes and device at hand.

    Before: `%maps = lowrank_delta(%x, ...)`. After, on a CPU where the C++ provider takes it:
    `%maps = torch.ops.stepgraph.lowrank_delta_cpu.default(%x, ...)`. The reference is a plain function, which torch.compile
    sees through.

    Raises:
        OpError: No provider takes an operation.
    """
    return _replace(gm, lambda op, args, kwargs: op.choose(*args, **kwargs))


def _replace(gm: fx.GraphModule, choose: Callable[[Op, Sequence[Any], Mapping[str, Any]], Provider]) -> int:
    count = 0
    for node in gm.graph.nodes:
        op = node.target
        if isinstance(op, Op):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            provider = choose(op, args, kwargs)
            node.target = provider.run
            node.meta[PROVIDER] = OpCall(op.name, provider.name)
            count += 1
    return count
