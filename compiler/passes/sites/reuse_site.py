"""Replace reused values by stored ones."""

import operator

from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext, find_input, markers, slot_name
from stepgraph.compiler.marking.graphs import storages_of
from stepgraph.plan import REUSE


def reuse_site(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Feed every user of a reused site from its slot; what computed the value loses its reader.

    Before, for a reused `transformer_blocks.0.ff` (float32 [B, N, C])::

        %ff = call_module[transformer_blocks.0.ff.net.2](%gelu)
        %value = site_value(%ff, site=transformer_blocks.0.ff)
        %gated = mul(%gate, %value)

    After::

        %gated = mul(%gate, %slot_transformer_blocks_0_ff)

    For `stack_residual` the slot holds the difference, and the value becomes `stack_input + slot`. A value that is a result or
    is written to is copied, so that the slot stays.
    """
    count = 0
    shared = set(ctx.written).union(*(storages_of(node) for node in ctx.results(gm.graph)))
    for index, marker in markers(gm.graph):
        if ctx.row[index] != REUSE:
            continue
        slot = find_input(gm.graph, slot_name(ctx.sites[index]))
        with gm.graph.inserting_before(marker):
            if ctx.sites[index].kind == "stack_residual":
                value = gm.graph.call_function(operator.add, (marker.args[1], slot))
            else:
                value = gm.graph.call_method("clone", (slot,)) if storages_of(marker) & shared else slot
        if value is not slot:
            value.meta |= {"val": marker.meta["val"]}
        marker.replace_all_uses_with(value)
        gm.graph.erase_node(marker)
        count += 1
    return count
