"""Return the values that a later step reads."""

import operator

from torch import fx

from stepgraph.compiler.graphs import storages_of
from stepgraph.compiler.passes.context import PassContext, markers


def store_site(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Append the values of the row's stored sites to the graph's outputs, in site order.

    Before::

        %value = site_value(%ff, site=transformer_blocks.0.ff)
        return (%sample,)

    After::

        %value = site_value(%ff, site=transformer_blocks.0.ff)
        return (%sample, %value)

    For `stack_residual` the stored value is `value - stack_input`. A value that shares its memory with
    an input, a result or another stored value, or that the graph writes to in place, is copied where it is made.
    """
    output = next(iter(reversed(gm.graph.nodes)))
    stored: list[fx.Node] = []
    # A stored value must not change or be held twice: inputs and results belong to the caller.
    shared = set(ctx.written).union(*(storages_of(node) for node in ctx.borders(gm.graph)))
    for index, marker in markers(gm.graph):
        if index not in ctx.stores:
            continue
        value = marker
        with gm.graph.inserting_after(marker):
            if ctx.sites[index].kind == "stack_residual":
                value = gm.graph.call_function(operator.sub, marker.args[:2])
            elif storages_of(marker) & shared:
                value = gm.graph.call_method("clone", (marker,))
        if value is not marker:
            value.meta |= {"val": marker.meta["val"]}
        shared |= storages_of(marker)
        stored.append(value)
    output.args = ((*output.args[0], *stored),)
    return len(stored)
