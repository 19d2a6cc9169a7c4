"""Kernels are tuned where they are compiled, once for each kind of call."""

import pytest
import torch
from torch import fx

from stepgraph.compiler.lowering import tune_kernels as file
from stepgraph.tuning import may_tune


@pytest.mark.parametrize("kinds", [1, 2])
def test_every_kind_of_call_runs_once_on_zeros(monkeypatch, kinds):
    seen = []

    def kernel(x, values, eps=0.0):
        seen.append((may_tune(), tuple(x.shape), x.stride(), float(x.abs().sum()), len(values)))
        return x

    monkeypatch.setattr(file, "TUNED", {kernel})
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(4, 6).T
    y = graph.placeholder("y")
    y.meta["val"] = torch.ones(3, 2)
    for value in (x, x, y)[: 1 + kinds]:
        graph.call_function(kernel, (value, [value, value]), {"eps": 1e-6})
    graph.output(x)
    gm = fx.GraphModule({}, graph)
    assert file.tune_kernels([gm, gm]) == kinds
    assert seen == [(True, (6, 4), (1, 6), 0.0, 2), (True, (3, 2), (2, 1), 0.0, 2)][:kinds]
    assert not may_tune()
