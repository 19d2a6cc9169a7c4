"""Replace linear maps by stored outputs with low-rank increments."""

import operator

import torch
from torch import fx

from stepgraph.compiler.interfaces.pass_context import (
    MapGroup,
    PassContext,
    coefficient_dtype,
    coefficients_name,
    find_input,
    slot_name,
)
from stepgraph.node_facts import MACS, MARKER, PROJECTION
from stepgraph.ops import linear_combination, lowrank_delta, lowrank_input
from stepgraph.plan import LOWRANK
from stepgraph.plan.liveness import MAPS


def lowrank_site(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Correct the linear maps of LOWRANK sites; project the inputs of those whose maps are stored.

    Before, for an attention's q, k and v (float32 [B, N, C] from [B, N, C])::

        %q = call_module[transformer_blocks.0.attn1.to_q](%x)        and %k, %v likewise

    After, in a row that corrects it, y being the stored outputs and p [B, N, R] the stored B x::

        %maps = lowrank_delta(%x, [%y_q, %y_k, %y_v], %p, [%a_q, %a_k, %a_v], %b)
        %q, %k, %v = %maps[0], %maps[1], %maps[2]

    and in a row that stores the maps::

        %q = call_module[transformer_blocks.0.attn1.to_q](%x)        and %k, %v likewise
        %p = lowrank_input(%x, %b)

    Where the row has a forecast for the site, y and p are the combinations of their last stored values instead: the increment
    is then taken around the forecast. Returns the number of maps that were corrected or are stored.
    """
    count, projected = 0, {site for site, part in ctx.stores if part == MAPS}
    for index, groups in ctx.groups.items():
        corrected = ctx.row[index] == LOWRANK
        if not corrected and index not in projected:
            continue
        for position, group in enumerate(groups):
            first = sum(len(g.maps) + 1 for g in groups[:position])
            if corrected:
                _correct(gm, ctx, index, group, first, f"factors_{index}_{position}")
            else:
                _project(gm, index, group, position, f"factors_{index}_{position}")
            count += len(group.maps)
    return count


def _correct(gm: fx.GraphModule, ctx: PassContext, index: int, group: MapGroup, first: int, name: str) -> None:
    """Replace a group of maps; `first` is the number of its first tensor within the site's stored value."""
    graph, nodes = gm.graph, _nodes(gm.graph)
    maps = [nodes[name] for name in group.maps]
    with graph.inserting_before(min(maps)):
        stored = [_stored(graph, ctx, index, first + offset) for offset in range(len(maps) + 1)]
        factors = [_attribute(gm, f"{name}_a{position}", tensor) for position, tensor in enumerate(group.a)]
        b = _attribute(gm, f"{name}_b", group.b)
        delta = graph.call_function(lowrank_delta, (nodes[group.input], stored[:-1], stored[-1], factors, b))
        tokens = stored[-1].meta["val"].numel() // group.b.shape[0]
        delta.meta |= {
            "val": [node.meta["val"] for node in maps],
            MACS: tokens * (group.b.numel() + sum(a.numel() for a in group.a)),
        }
        parts = [graph.call_function(operator.getitem, (delta, position)) for position in range(len(maps))]
    for node, part in zip(maps, parts, strict=True):
        part.meta |= {key: value for key, value in node.meta.items() if key not in (MACS, MARKER)}
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _stored(graph: fx.Graph, ctx: PassContext, index: int, tensor: int) -> fx.Node:
    """One tensor of the site's stored maps, or its forecast."""
    forecast, constant = ctx.forecasts.get(index, (None, 0))
    ages = forecast.ages if forecast else (1,)
    values = [find_input(graph, slot_name(ctx.sites[index], MAPS, age, tensor)) for age in ages]
    if forecast is None:
        return values[0]
    node = graph.call_function(linear_combination, (values, find_input(graph, coefficients_name(constant))))
    node.meta |= {"val": values[0].meta["val"].clone()}
    return node


def _project(gm: fx.GraphModule, index: int, group: MapGroup, position: int, name: str) -> None:
    """Add the node of a group's input in rank space, behind the input."""
    x = _nodes(gm.graph)[group.input]
    wide: torch.Tensor = x.meta["val"]
    # Behind the maps: until there the input is not written to.
    with gm.graph.inserting_before(min(_nodes(gm.graph)[map_name] for map_name in group.maps)):
        b = _attribute(gm, f"{name}_b", group.b)
        p = gm.graph.call_function(lowrank_input, (x, b))
    p.meta |= {
        "val": wide.new_empty((*wide.shape[:-1], group.b.shape[0]), dtype=coefficient_dtype(wide.dtype)),
        MACS: wide.numel() // wide.shape[-1] * group.b.numel(),
        PROJECTION: (index, position),
    }


def _nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    return {node.name: node for node in graph.nodes}


def _attribute(gm: fx.GraphModule, name: str, tensor: torch.Tensor) -> fx.Node:
    """A node that reads a constant tensor."""
    if not hasattr(gm, name):
        gm.register_buffer(name, tensor)
    node = gm.graph.get_attr(name)
    node.meta |= {"val": tensor}
    return node
