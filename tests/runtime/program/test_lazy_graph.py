"""A graph's Python is written when it is needed, and is that of the graph as it is then."""

import torch
from torch import fx

import stepgraph as sg
from helpers.tiny import inputs
from stepgraph.runtime.program.lazy_graph import lazy_graph, written_forward


def test_a_call_and_a_forward_see_the_last_rewrite():
    graph = fx.Graph()
    summed = graph.call_function(torch.add, (graph.placeholder("x"), 1))
    graph.output(summed)
    gm, two = lazy_graph({}, graph, "Sum"), torch.full((), 2.0)
    assert type(gm).__name__ == "Sum"
    assert gm(two) == 3
    for added in (5, 7):
        summed.args = (summed.args[0], added)
        gm.recompile()
        assert written_forward(gm)(two) == gm(two) == 2 + added
        assert f"add(x, {added})" in gm.code


def test_only_graphs_that_run_are_written(dit, ddim, monkeypatch):
    """Not the graph that rows are copied from, nor a row's between its passes."""
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=4, every=2)
    written, write = [], fx.GraphModule.recompile
    monkeypatch.setattr(fx.GraphModule, "recompile", lambda gm: (written.append(gm), write(gm))[1])
    exe = sg.compile(dit, plan, inputs(), backend="eager", exact=True)
    variants = [variant.graph for variant in exe.default.variants]
    assert len(variants) == 2
    # What is hoisted is handed on as functions, before the last pass.
    others = [gm for gm in written if type(gm).__name__ != "Hoisted"]
    assert [id(gm) for gm in others] == [id(gm) for gm in variants]
