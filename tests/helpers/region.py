"""A region to compile, and its graph."""

import torch
from torch import fx

from stepgraph.node_facts import output_of


def region(factor: float = 2.0) -> fx.GraphModule:
    """(x, y) -> (x * factor + y,)"""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output((graph.call_function(torch.add, (graph.call_function(torch.mul, (x, factor)), y)),))
    return fx.GraphModule({}, graph)


def product() -> fx.GraphModule:
    """(x, y) -> (x * 2 + y, (x * 2 + y) @ its transpose): the same kernel as `region`, and more."""
    gm = region()
    (total,) = output_of(gm.graph).args[0]
    output = output_of(gm.graph)
    with gm.graph.inserting_before(output):
        square = gm.graph.call_function(torch.mm, (total, gm.graph.call_method("t", (total,))))
    output.args = ((total, square),)
    gm.recompile()
    return gm
