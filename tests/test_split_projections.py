"""FLUX's single blocks: attention and MLP meet in one projection, and each is stored as its own part of the product."""

from collections import Counter
from dataclasses import replace

import diffusers
import pytest
import torch
from oracle_families import FluxOracle, run_flow
from test_corrections import error
from test_families import FLUX, IMAGE, STEPS, TEXT, WIDTH, flux_inputs, flux_plan

import stepgraph as sg
from stepgraph.compiler.describe import marked_graph
from stepgraph.compiler.split_projections import split_projections
from stepgraph.corrections import Forecast
from stepgraph.plan import CachePlan

N, C = IMAGE + TEXT, WIDTH
# What each half costs, and its part of the projection.
ATTENTION, MLP = 3 * N * C * C + 2 * N * N * C + N * C * C, 4 * N * C * C + 4 * N * C * C


@pytest.fixture(scope="module")
def flux() -> diffusers.FluxTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(**FLUX).eval()


@pytest.fixture
def flow() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def halves(attention: str, mlp: str) -> dict[str, str]:
    """Actions of both single blocks, the double blocks computed."""
    actions = {f"single_transformer_blocks.{i}.attn": attention for i in range(2)}
    return actions | {"mlp": mlp}


def run(model, plan: CachePlan, flow, exact: bool = False) -> sg.Executable:
    """Compile a plan and run it beside the oracle, which knows of no halves."""
    inputs = flux_inputs(2)
    exe = sg.compile(model, plan, inputs, backend="eager", exact=exact)
    session = exe.session()
    got = run_flow(session, flow, plan.steps, inputs)
    wanted = run_flow(FluxOracle.of(model, plan), flow, plan.steps, inputs)
    for value, expected in zip(got, wanted, strict=True):
        assert error(value, expected) <= (0 if exact else 2e-6)
    assert session.slot_bytes == 0
    assert session.peak_slot_bytes <= exe.memory().peak_slot_bytes
    return exe


def projections(exe: sg.Executable, step: int) -> Counter:
    """How often the single blocks' projection is called, and how many parts of it are multiplied."""
    graph = exe.default.variants[exe.default.rows[step]].graph.graph
    whole = [n for n in graph.nodes if n.op == "call_module" and str(n.target).endswith("proj_out") and "single" in n.target]
    parts = [n for n in graph.nodes if n.target is torch.nn.functional.linear]
    return Counter(whole=len(whole), parts=len(parts))


@pytest.mark.parametrize(
    ("attention", "mlp", "parts", "slot"),
    [
        ("CRCR", "CCCC", (2, 1, 2, 1), N * C),
        ("CCCC", "CRCR", (2, 1, 2, 1), N * C),
        ("CRRC", "CCRR", (2, 1, 0, 1), 2 * N * C),
        ("CRRR", "CRRR", (2, 0, 0, 0), 2 * N * C),
    ],
)
def test_a_reused_half_saves_its_part_of_the_projection(flux, flow, attention, mlp, parts, slot):
    plan = flux_plan(flux, flow, halves(attention, mlp))
    exe = run(flux, plan, flow)
    assert [projections(exe, s) for s in range(STEPS)] == [Counter(whole=0, parts=2 * count) for count in parts]
    saved = [2 * (ATTENTION * (a == "R") + MLP * (m == "R")) for a, m in zip(attention, mlp, strict=True)]
    total = marked_graph(flux, flux_inputs()).macs
    assert list(exe.macs().per_step) == [2 * (total - own) for own in saved]
    # The program's own plan says so of its sites; the one that was given knows of no halves.
    assert exe.default.plan.summary().macs == STEPS * total - sum(saved) < exe.plan.summary().macs
    assert exe.memory().peak_slot_bytes == 2 * 2 * 4 * slot


def test_exact_graphs_and_those_without_the_pass_keep_the_whole_projection(flux, flow, monkeypatch):
    plan = flux_plan(flux, flow, halves("CRCR", "CCRR"))
    exact = run(flux, plan, flow, exact=True)
    monkeypatch.setenv("STEPGRAPH_DISABLE_PASS", "split_projections")
    for exe in (exact, run(flux, plan, flow)):
        assert [projections(exe, s) for s in range(STEPS)] == [Counter(whole=2)] * STEPS
        assert exe.macs().computed == 2 * plan.summary().macs


def test_every_pass_is_checked_on_real_data(flux, flow, monkeypatch):
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    run(flux, flux_plan(flux, flow, halves("CRRC", "CCRR")), flow)


@pytest.mark.parametrize("reason", ["nothing reused", "a forecast", "a corrected projection", "another kind of linear map"])
def test_what_is_left_alone(flow, reason):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**FLUX).eval()
    actions = halves("CCCC", "CCCC")
    if reason == "a forecast":
        actions = halves("CFRC", "CCCC")
    elif reason == "a corrected projection":
        actions = {**halves("CRCC", "CCCC"), "proj_out": "CCLC"}
    elif reason == "another kind of linear map":
        actions = halves("CRCR", "CRRC")
        for block in model.single_transformer_blocks:
            block.proj_out = type("Other", (torch.nn.Linear,), {})(5 * C, C).eval()
    plan = flux_plan(model, flow, actions)
    last = Forecast(("y1",), ((1.0,),))
    plan = replace(plan, forecasts={(s, i): last for s, row in enumerate(plan.rows) for i, a in enumerate(row) if a == "F"})
    marked = marked_graph(model, flux_inputs())
    assert split_projections(marked, model, plan) is marked


def test_a_projection_may_be_split_in_one_block_and_reused_in_another(flux, flow):
    plan = flux_plan(flux, flow, {"single_transformer_blocks.0.attn": "CRCR", "single_transformer_blocks.1.proj_out": "CCRR"})
    exe = run(flux, plan, flow)
    assert [projections(exe, s) for s in range(STEPS)] == [
        Counter(whole=1, parts=2), Counter(whole=1, parts=1), Counter(whole=0, parts=2), Counter(whole=0, parts=1),
    ]  # fmt: skip
