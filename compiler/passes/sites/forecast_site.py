"""Replace forecast values by combinations of stored ones."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext, coefficients_name, find_input, markers, slot_name
from stepgraph.ops import linear_combination
from stepgraph.plan import FORECAST
from stepgraph.plan.liveness import INPUT, VALUE


def forecast_site(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Make the value of every FORECAST site a linear combination of its stored values; what computed it loses its reader.

    Before, for a forecast `transformer_blocks.0.ff` (float32 [B, N, C]) of two terms::

        %ff = call_module[transformer_blocks.0.ff.net.2](%gelu)
        %value = site_value(%ff, site=transformer_blocks.0.ff)
        %gated = mul(%gate, %value)

    After::

        %forecast = linear_combination([%slot_transformer_blocks_0_ff, %slot_transformer_blocks_0_ff_age2], %coefficients_0)
        %gated = mul(%gate, %forecast)

    For `stack_residual` the slots hold differences, and the value becomes `stack_input + forecast`. Where `output` is forecast
    from the model's input too and has more channels than that, the input's terms go to the first of them, which are the
    prediction of the noise.
    """
    count = 0
    for index, marker in markers(gm.graph):
        if ctx.row[index] != FORECAST:
            continue
        with gm.graph.inserting_before(marker):
            value = _combined(gm.graph, ctx, index, marker.meta["val"])
            if ctx.sites[index].kind == "stack_residual":
                value = gm.graph.call_function(operator.add, (marker.args[1], value))
                value.meta |= {"val": marker.meta["val"]}
        marker.replace_all_uses_with(value)
        gm.graph.erase_node(marker)
        count += 1
    return count


def _combined(graph: fx.Graph, ctx: PassContext, index: int, like: torch.Tensor) -> fx.Node:
    """The node of a site's forecast."""
    forecast, constant = ctx.forecasts[index]
    coefficients, site = find_input(graph, coefficients_name(constant)), ctx.sites[index]
    stored = [find_input(graph, slot_name(site, VALUE, age)) for age in forecast.ages]
    inputs = [find_input(graph, slot_name(site, INPUT, age)) if age else next(iter(graph.nodes)) for age in forecast.inputs]
    if all(node.meta["val"].shape == like.shape for node in inputs):
        return _combination(graph, [*stored, *inputs], coefficients)
    # [B, C_out, ...] of which the first C_in channels belong to the input.
    forecast_of_output = _combination(graph, stored, _part(graph, coefficients, 0, len(stored)))
    added = _combination(graph, inputs, _part(graph, coefficients, len(stored), len(forecast.terms)))
    channels = inputs[0].meta["val"].shape[1]
    first = _call(graph, operator.add, (_channels(graph, forecast_of_output, 0, channels), added))
    return _call(graph, torch.cat, ([first, _channels(graph, forecast_of_output, channels, like.shape[1])], 1))


def _combination(graph: fx.Graph, values: list[fx.Node], coefficients: fx.Node) -> fx.Node:
    node = graph.call_function(linear_combination, (values, coefficients))
    node.meta |= {"val": values[0].meta["val"].clone()}
    return node


def _part(graph: fx.Graph, node: fx.Node, start: int, stop: int) -> fx.Node:
    return _call(graph, operator.getitem, (node, slice(start, stop)))


def _channels(graph: fx.Graph, node: fx.Node, start: int, stop: int) -> fx.Node:
    return _call(graph, operator.getitem, (node, (slice(None), slice(start, stop))))


def _call(graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
    """A function's node with its value's shape."""
    node = graph.call_function(target, args)
    node.meta |= {"val": target(*fx.map_arg(args, lambda n: n.meta["val"]))}
    return node
