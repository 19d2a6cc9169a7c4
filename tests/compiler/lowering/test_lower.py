"""Backends: what inductor compiles is compiled once, and stays what was compiled."""

import operator

import pytest
import torch
from torch import fx, nn

from stepgraph.compiler.lowering.lower import compile_whole, lower
from stepgraph.config import CompileConfig
from stepgraph.errors import CompileError
from stepgraph.runtime.memory.arena import Arena


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


@pytest.mark.slow
@torch.no_grad()
def test_many_variants_all_stay_compiled():
    # More than dynamo's limit of recompilations of one function, past which it would fall back to eager.
    owner, x = Owner(), torch.randn(2, 4)
    graphs = [graph_number(number, owner) for number in range(10)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = [compile_whole(gm) for gm in graphs]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == len(graphs)
    for gm, call in zip(graphs, compiled, strict=True):
        torch.testing.assert_close(call(x)[0], gm(x)[0])
        # The same values with other strides run the same code.
        torch.testing.assert_close(call(x.t().contiguous().t())[0], gm(x)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == len(graphs)


@torch.no_grad()
def test_other_shapes_are_refused():
    compiled = compile_whole(graph_number(0, Owner()))
    with pytest.raises(CompileError, match=r"compiled for arguments of the shapes \[\(2, 4\)\]; given are \[\(3, 4\)\]"):
        compiled(torch.randn(3, 4))


@pytest.mark.parametrize("change", ["inference mode", "threads", "determinism", "precision", "gradients", "training"])
def test_what_does_not_change_the_code_does_not_compile_it_again(change):
    owner = Owner().eval()
    gm, x = graph_number(0, owner), torch.randn(2, 4)
    compiled = compile_whole(gm)
    with torch.no_grad():
        wanted = gm(x)[0]
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        if change == "threads":
            torch.set_num_threads(threads + 1)
        if change == "determinism":
            torch.use_deterministic_algorithms(True, warn_only=True)
        if change == "precision":
            torch.set_float32_matmul_precision("medium")
        if change == "gradients":
            owner.requires_grad_(False)
        if change == "training":
            owner.train()
        with torch.inference_mode() if change == "inference mode" else torch.no_grad():
            torch.testing.assert_close(compiled(torch.clone(x))[0], wanted, rtol=2e-2, atol=2e-2)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(precision)


def test_eager_runs_the_graph_itself():
    gm = graph_number(0, Owner())
    x = torch.randn(2, 4)
    (run,) = lower([gm], CompileConfig("eager"), lambda path: False, 1).runs
    assert torch.equal(run([x], [], Arena.of(0, x.device))[0], gm(x)[0])
    assert run.forward.__self__ is gm
