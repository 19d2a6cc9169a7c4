"""Operations that a trace has seen are not run again: the graph is the one of a trace that runs them all."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.families import FLUX, flux_inputs
from helpers.tiny import inputs, tiny_dit
from helpers.traced import Small
from stepgraph.compiler.tracing.known_results import KnownResults, leaf_operation
from stepgraph.compiler.tracing.trace import trace
from stepgraph.compiler.tracing.tracer import Tracer
from stepgraph.node_facts import MACS, MUTATES

pytestmark = pytest.mark.traces


def facts_of(traced):
    return [
        (
            node.format_node(),
            node.meta[MACS],
            bool(node.meta[MUTATES]),
            (value.shape, value.stride(), value.storage_offset(), value.dtype, value.device),
        )
        for node in traced.graph.nodes
        if isinstance(value := node.meta.get("val"), torch.Tensor)
    ]


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_the_graph_is_that_of_a_trace_that_runs_everything(family, monkeypatch):
    import diffusers

    model, given = (
        (tiny_dit(), inputs(2)) if family == "dit" else (diffusers.FluxTransformer2DModel(**FLUX).eval(), flux_inputs(2))
    )
    runs = []
    run_leaf = Tracer.run_leaf
    monkeypatch.setattr(Tracer, "run_leaf", lambda self, *args: runs.append(self.values.results) or run_leaf(self, *args))
    quick = facts_of(trace(model, given))
    # The second block's linear maps are the first's.
    assert 0 < sum(len(results._results) for results in {id(results): results for results in runs}.values()) < len(quick)
    monkeypatch.setattr(KnownResults, "find", lambda self, key: None)
    assert quick == facts_of(trace(model, given))


def test_what_differs_is_run():
    one, other = nn.LayerNorm(6), nn.LayerNorm(6, eps=1e-3)
    assert leaf_operation(one) == leaf_operation(nn.LayerNorm(6)) != leaf_operation(other)
    hooked = nn.LayerNorm(6)
    hooked.register_forward_hook(lambda *_: None)
    assert leaf_operation(hooked) is None

    def forward(self, x):
        half, whole = x.to(torch.bfloat16), x * 2
        return F.silu(half), F.silu(whole), whole * 2, half * 2, (x > 0) * True, (x > 0) * 1

    traced = trace(Small(forward).eval(), {"x": torch.ones(2, 6)})
    (outputs,) = next(node for node in traced.graph.nodes if node.op == "output").args
    kinds = [node.meta["val"].dtype for node in outputs]
    assert kinds == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.bool, torch.int64]


def test_views_and_writes_are_run_every_time():
    def forward(self, x):
        one, other = x + 1, x + 1
        one.mul_(2)
        other.mul_(2)
        return one, other, one.view(3, 4), other.view(3, 4)

    traced = trace(Small(forward).eval(), {"x": torch.ones(2, 6)})
    first, second, *views = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    storages = [node.meta["val"].untyped_storage()._cdata for node in (first, second, *views)]
    assert storages[0] != storages[1]
    assert storages[2:] == storages[:2]
