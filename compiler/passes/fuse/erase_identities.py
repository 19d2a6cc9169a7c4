"""Take out operations that return what they are given."""

import operator

import torch
from torch import fx, nn

from stepgraph.compiler.interfaces.pass_context import PassContext, erase_unread
from stepgraph.compiler.marking.graphs import storages_of
from stepgraph.node_facts import output_of


def erase_identities(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Feed the users of an operation that changes nothing from its argument.

    These are a dropout in evaluation mode, a division or multiplication by 1, a conversion to the dtype at hand, and joining
    what a tensor was just split into, as FLUX does with text and image between its single blocks. They stand between a linear
    map and its gate, or between one residual and the next, where the fused operations look for these. Not
    where something is written to in place, and not where the caller gets the value: both may
    want a copy.

    Before: `%dropped = call_module[to_out.1](%out)`, `%value = div(%dropped, 1.0)`, `%gated = mul(%gate, %value)`.
    After: `%gated = mul(%gate, %out)`.
    """
    count = 0
    output = output_of(gm.graph)
    for node in list(gm.graph.nodes):
        if output in node.users:
            continue
        joined = _rejoined(node)
        source = joined or (node.args[0] if node.args else None)
        if not isinstance(source, fx.Node) or storages_of(source) & ctx.written:
            continue
        if joined or _changes_nothing(gm, node, source):
            parts = [part for part in node.all_input_nodes if part is not source]
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
            erase_unread(parts)
            count += 1
    return count


def _rejoined(node: fx.Node) -> fx.Node | None:
    """What a concatenation joins the slices of, if these are all of it, in order and once each."""
    parts = node.args[0] if node.target is torch.cat and node.args else None
    if not isinstance(parts, (list, tuple)) or not all(isinstance(n, fx.Node) and n.target is operator.getitem for n in parts):
        return None
    source, dim = parts[0].args[0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(source, fx.Node) or not isinstance(dim, int) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    shape, end = source.meta["val"].shape, 0
    for part in parts:
        index = part.args[1]
        if part.args[0] is not source or not isinstance(index, tuple) or not all(isinstance(i, slice) for i in index):
            return None
        ranges = [range(*i.indices(size)) for i, size in zip(index, shape, strict=False)]
        cut = ranges.pop() if len(ranges) == dim % len(shape) + 1 else None
        if cut is None or (cut.start, cut.step) != (end, 1) or any(len(r) != n for r, n in zip(ranges, shape, strict=False)):
            return None
        end = cut.stop
    return source if end == shape[dim] else None


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
