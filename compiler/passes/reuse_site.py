"""Replace reused values by stored ones."""

import operator

from torch import fx

from stepgraph.compiler.graphs import storages_of
from stepgraph.compiler.passes.context import PassContext, markers, slot_name
from stepgraph.plan import REUSE


def reuse_site(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Feed every user of a reused site from its slot; what computed the value loses its reader.

    Before, for a reused `transformer_blocks.0.ff` (float32 [B, N, C])::

        %ff = call_module[transformer_blocks.0.ff.net.2](%gelu)
        %value = site_value(%ff, site=transformer_blocks.0.ff)
        %gated = mul(%gate, %value)

    After::

        %slot_transformer_blocks_0_ff = placeholder
        %gated = mul(%gate, %slot_transformer_blocks_0_ff)

    For `stack_residual` the slot holds the difference, and the value becomes `stack_input + slot`.
    """
    count = 0
    shared = set(ctx.written).union(*(storages_of(node) for node in ctx.results(gm.graph)))
    for index, marker in markers(gm.graph):
        if ctx.row[index] != REUSE:
            continue
        value = _slot(gm.graph, marker, slot_name(ctx.sites[index]), copied=bool(storages_of(marker) & shared))
        if ctx.sites[index].kind == "stack_residual":
            with gm.graph.inserting_before(marker):
                value = gm.graph.call_function(operator.add, (marker.args[1], value))
            value.meta |= {"val": marker.meta["val"]}
        marker.replace_all_uses_with(value)
        gm.graph.erase_node(marker)
        count += 1
    return count


def _slot(graph: fx.Graph, marker: fx.Node, name: str, copied: bool) -> fx.Node:
    """A new input for a stored value; copied where the value is a result or is written to, so that the slot stays."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        slot = graph.placeholder(name)
    slot.meta |= {"val": marker.meta["val"], "slot": marker.meta["marker"]}
    if copied:
        with graph.inserting_before(first):
            slot = graph.call_method("clone", (slot,))
        slot.meta |= {"val": marker.meta["val"]}
    return slot
