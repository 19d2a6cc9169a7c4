"""Backends: what inductor compiles is compiled once, and stays what was compiled."""

import operator

import pytest
import torch
from torch import fx, nn

from stepgraph.compiler.lower import lower
from stepgraph.config import CompileConfig


class Owner(nn.Module):
    """Holds the one linear layer that the graphs below call."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)


def graph_number(number: int, owner: Owner) -> fx.GraphModule:
    """linear(x) + number, with a few more operations the larger the number."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 4)
    value = graph.call_function(operator.add, (graph.call_module("linear", (x,)), float(number)))
    for _ in range(number % 3):
        value = graph.call_function(torch.relu, (value,))
    graph.output((value,))
    return fx.GraphModule(owner, graph)


@torch.no_grad()
def test_many_variants_all_stay_compiled():
    # More than dynamo's limit of recompilations of one function, past which it would fall back to eager.
    owner, x = Owner(), torch.randn(2, 4)
    graphs = [graph_number(number, owner) for number in range(10)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = [lower(gm, CompileConfig("inductor")) for gm in graphs]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == len(graphs)
    for gm, call in zip(graphs, compiled, strict=True):
        torch.testing.assert_close(call(x)[0], gm(x)[0])
        # The same values with other strides run the same code.
        torch.testing.assert_close(call(x.t().contiguous().t())[0], gm(x)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == len(graphs)


@torch.no_grad()
def test_compiling_again_at_run_time_is_an_error():
    compiled = lower(graph_number(0, Owner()), CompileConfig("inductor"))
    with pytest.raises(RuntimeError, match="recompile"):
        compiled(torch.randn(3, 4))


def test_eager_runs_the_graph_itself():
    gm = graph_number(0, Owner())
    assert lower(gm, CompileConfig("eager")) is gm
