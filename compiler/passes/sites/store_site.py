"""Return the values that a later step reads."""

import operator

from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext, markers
from stepgraph.compiler.marking.graphs import storages_of
from stepgraph.node_facts import PROJECTION, output_of
from stepgraph.plan.liveness import INPUT, MAPS


def store_site(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Append what the row stores to the graph's outputs, by site and part; returns the number of stored values.

    Before::

        %value = site_value(%ff, site=transformer_blocks.0.ff)
        return (%sample,)

    After::

        %value = site_value(%ff, site=transformer_blocks.0.ff)
        return (%sample, %value)

    For `stack_residual` the stored value is `value - stack_input`. Of linear maps, every output is stored, then every group's
    `lowrank_input`. A tensor that shares its memory with an input, a result or another stored tensor, or that the graph writes
    to in place, is copied where it is made.
    """
    graph = gm.graph
    output = output_of(graph)
    # A stored value must not change or be held twice: inputs and results belong to the caller.
    shared = set(ctx.written).union(*(storages_of(node) for node in ctx.borders(graph)))
    at = dict(markers(graph))
    stored: list[fx.Node] = []

    def keep(node: fx.Node, behind: fx.Node) -> None:
        value = node
        if storages_of(node) & shared:
            with graph.inserting_after(behind):
                value = graph.call_method("clone", (node,))
            value.meta |= {"val": node.meta["val"].clone()}
        shared.update(storages_of(node))
        stored.append(value)

    for index, part in ctx.stores:
        if part == INPUT:
            first = next(iter(graph.nodes))
            keep(first, next(node for node in reversed(graph.nodes) if node.op == "placeholder"))
        elif part == MAPS:
            for node in _maps(graph, ctx, index):
                keep(node, node)
        elif ctx.sites[index].kind == "stack_residual":
            with graph.inserting_after(at[index]):
                value = graph.call_function(operator.sub, at[index].args[:2])
            value.meta |= {"val": at[index].meta["val"].clone()}
            stored.append(value)
        else:
            keep(at[index], at[index])
    output.args = ((*output.args[0], *stored),)
    return len(ctx.stores)


def _maps(graph: fx.Graph, ctx: PassContext, index: int) -> list[fx.Node]:
    """The tensors of a site's linear maps, in the order in which they are stored."""
    nodes = {node.name: node for node in graph.nodes}
    projections = {node.meta[PROJECTION]: node for node in graph.nodes if PROJECTION in node.meta}
    tensors = []
    for position, group in enumerate(ctx.groups[index]):
        tensors += [nodes[name] for name in group.maps] + [projections[index, position]]
    return tensors
