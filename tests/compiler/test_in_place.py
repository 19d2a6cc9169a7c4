"""Models that write in place: nodes without readers survive, and stored values are those of the moment they were made."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.oracle import Oracle
from helpers.plans import random_rows
from stepgraph.compiler.interfaces.family import Family, Stack
from stepgraph.compiler.marking.mark_sites import mark_sites
from stepgraph.compiler.specializing.specialize import specialize
from stepgraph.compiler.tracing.trace import trace
from stepgraph.node_facts import MUTATES
from stepgraph.plan import CachePlan, PlanHeader
from stepgraph.plan.liveness import traffic

TOY = Family(
    classes=("Toy",), stacks=(Stack("transformer_blocks.*", {"attn1": ("attn",), "ff": ("ff",)}, streams=True),),
    example_inputs=lambda *_: {}, conditioning=lambda *_: ({}, {}),
)  # fmt: skip


class Part(nn.Module):
    """A linear map that goes on in place in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(8, 8), way

    def forward(self, x):
        h = self.linear(x)
        if self.way == "result used":
            return h.relu_()
        if self.way == "result dropped":
            h.relu_()
            h.add_(x)
        elif self.way == "view written":
            h[:, :2].copy_(x[:, :2])
            h[:, 3] = 0.5
        elif self.way == "view returned":
            return torch.cat([h, h], dim=-1)[..., :8].relu_()
        return h


class Block(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.attn1, self.ff, self.way = Part(way), Part(way), way

    def forward(self, x):
        a = self.attn1(x)
        # The site's value is written to after it was made, with and without using what the write returns.
        a += x
        a[:, 0].mul_(0.5)
        y = x.clone()
        y[:, 1:] = a[:, 1:]
        f = self.ff(y)
        f.mul_(0.5).add_(y)
        if self.way == "result dropped":
            # The block's value is its own input, written to.
            x.add_(f)
            return x
        x += f
        return x


class Toy(nn.Module):
    """Has the module names that the oracle knows from DiT."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.pos_embed = nn.Linear(8, 8)
        self.transformer_blocks = nn.ModuleList(Block(way) for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, hidden_states, return_dict=True):
        tokens = self.pos_embed(hidden_states)
        for block in self.transformer_blocks:
            tokens = block(tokens)
        out = self.head(tokens)
        out -= tokens
        out[:, 0] = 1.0
        return (out,)


WAYS = ("result used", "result dropped", "view written", "view returned", "plain")


def make(way: str):
    torch.manual_seed(2)
    model = Toy(way).eval()
    marked = mark_sites(trace(model, {"hidden_states": torch.zeros(2, 4, 8)}), TOY)
    return model, marked


def header(steps: int) -> PlanHeader:
    return PlanHeader(
        model="Toy", fingerprint="-", scheduler="-", scheduler_hash="-", steps=steps, timesteps=tuple(range(steps, 0, -1)),
        shapes={"hidden_states": (4, 8)}, dtype="float32", macs=0,
    )  # fmt: skip


def run_both(model, marked, plan: CachePlan):
    """Outputs of the specialised graphs, with slots kept by hand, and of the oracle."""
    graphs, oracle, stored, results = specialize(marked, model, plan), Oracle.of(model, plan), {}, []
    torch.manual_seed(3)
    for step, moved in enumerate(traffic(plan)):
        x = torch.randn(2, 4, 8)
        with torch.no_grad():
            out, *values = graphs.graphs[graphs.rows[step]](x.clone(), *(stored[value] for value in moved.sources))
        stored |= dict(zip(moved.stores, values, strict=True))
        results.append((out, oracle(hidden_states=x.clone(), return_dict=False)[0]))
    return graphs, results


@pytest.mark.parametrize("way", WAYS)
def test_the_trace_is_exact(way):
    model, marked = make(way)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        assert torch.equal(marked.trace.bind(model)(x.clone())[0], model(x.clone())[0])
    plan = CachePlan(header(1), marked.sites, ("C" * len(marked.sites),))
    graphs, [(got, wanted)] = run_both(model, marked, plan)
    assert torch.equal(got, wanted)
    names = [node.target for node in graphs.graphs[0].graph.nodes if node.meta.get(MUTATES)]
    assert names.count("mul_") == 4
    assert len([node for node in marked.graph.nodes if node.meta.get(MUTATES)]) == len(names)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=10)
@given(data=st.data())
def test_random_plans_equal_the_oracle(way, data):
    model, marked = make(way)
    plan = CachePlan(header(5), marked.sites, data.draw(random_rows(marked.sites, 5)))
    _, results = run_both(model, marked, plan)
    for step, (got, wanted) in enumerate(results):
        assert torch.equal(got, wanted), f"step {step}"


@pytest.mark.parametrize("way", WAYS)
def test_what_only_wrote_to_a_reused_value_is_gone(way):
    model, marked = make(way)
    plan = CachePlan.build(header(2), marked.sites, {"attn": "CR", "ff": "CR"})
    graphs, results = run_both(model, marked, plan)
    assert all(torch.equal(got, wanted) for got, wanted in results)
    nodes = graphs.graphs[graphs.rows[1]].graph.nodes
    assert {node.target for node in nodes if node.op == "call_module"} == {"pos_embed", "head"}
    assert not [node for node in nodes if "relu_" in str(node.target)]
