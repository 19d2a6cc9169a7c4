"""Give the graph its inputs for stored values and coefficients."""

from collections.abc import Sequence

import torch
from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext, coefficient_dtype, coefficients_name, markers, slot_name
from stepgraph.node_facts import SLOT
from stepgraph.plan.liveness import INPUT, MAPS, Read


def add_slots(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Append an input for every tensor of every stored value that the row reads, in the row's order, then the coefficients.

    Before: `%hidden_states = placeholder`. After, with a reused `transformer_blocks.0.ff` (float32 [B, N, C]) and a forecast
    of two terms::

        %hidden_states = placeholder
        %slot_transformer_blocks_0_ff = placeholder                      # float32 [B, N, C]
        %coefficients_0 = placeholder                                    # float32 [2]
    """
    values = {index: marker.meta["val"] for index, marker in markers(gm.graph)}
    before = next(node for node in gm.graph.nodes if node.op != "placeholder")
    count = 0

    def add(name: str, value: torch.Tensor, **meta: int) -> None:
        nonlocal count
        with gm.graph.inserting_before(before):
            node = gm.graph.placeholder(name)
        node.meta |= {"val": value, **meta}
        count += 1

    for read in ctx.reads:
        for tensor, value in enumerate(stored_tensors(gm.graph, ctx, read, values[read.site])):
            meta = {} if read.part == MAPS else {SLOT: read.site}
            add(slot_name(ctx.sites[read.site], read.part, read.age, tensor), value, **meta)
    for constant, site in sorted({constant: site for site, (_, constant) in ctx.forecasts.items()}.items()):
        forecast, value = ctx.forecasts[site][0], values[site]
        shape = (len(forecast.terms), value.shape[-1]) if forecast.per_channel else (len(forecast.terms),)
        add(coefficients_name(constant), value.new_empty(shape, dtype=coefficient_dtype(value.dtype)))
    return count


def stored_tensors(graph: fx.Graph, ctx: PassContext, read: Read, value: torch.Tensor) -> Sequence[torch.Tensor]:
    """What a stored value consists of, as empty tensors: for linear maps every output, then every group's rank-space input."""
    if read.part == INPUT:
        return [next(node for node in graph.nodes if node.op == "placeholder").meta["val"].clone()]
    if read.part != MAPS:
        return [value]
    named = {node.name: node for node in graph.nodes}
    tensors = []
    for group in ctx.groups[read.site]:
        tensors += [named[name].meta["val"].clone() for name in group.maps]
        wide = named[group.input].meta["val"]
        tensors.append(wide.new_empty((*wide.shape[:-1], group.b.shape[0]), dtype=coefficient_dtype(wide.dtype)))
    return tensors
