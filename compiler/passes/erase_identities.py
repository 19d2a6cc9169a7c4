"""Take out operations that return what they are given."""

import torch
from torch import fx, nn

from stepgraph.compiler.graphs import storages_of
from stepgraph.compiler.passes.context import PassContext


def erase_identities(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Feed the users of an operation that changes nothing from its argument.

    These are a dropout in evaluation mode, a division or multiplication by 1, and a conversion to the dtype at hand. They stand
    between a linear map and its gate, where the fused operations look for it. Not with `ctx.exact`, which keeps every
    operation, not where something is written to in place, and not where the caller gets the value: both may want a copy.

    Before: `%dropped = call_module[to_out.1](%out)`, `%value = div(%dropped, 1.0)`, `%gated = mul(%gate, %value)`.
    After: `%gated = mul(%gate, %out)`.
    """
    count = 0
    output = next(iter(reversed(gm.graph.nodes)))
    for node in list(gm.graph.nodes) if not ctx.exact else ():
        if output in node.users:
            continue
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and _changes_nothing(gm, node, source) and not storages_of(source) & ctx.written:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
            count += 1
    return count


def _changes_nothing(gm: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), (nn.Dropout, nn.Identity))
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if (before.dtype, before.shape, before.device) != (after.dtype, after.shape, after.device):
        return False
    if node.op == "call_method" and node.target in ("div", "mul"):
        return len(node.args) == 2 and type(node.args[1]) in (int, float) and bool(node.args[1] == 1) and not node.kwargs
    # A conversion that asks for a dtype or device alone; layouts and copies are another matter.
    wanted = [*node.args[1:], *node.kwargs.values()]
    return node.op == "call_method" and node.target == "to" and all(isinstance(w, (torch.dtype, torch.device)) for w in wanted)
