"""FLUX's single blocks: attention and MLP meet in one projection, and each is stored as its own part of the product."""

from collections import Counter
from dataclasses import replace

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.distance import SAME_RUN, error
from helpers.families import FLUX, IMAGE, STEPS, TEXT, WIDTH, flux_inputs, flux_plan
from helpers.oracle_families import FluxOracle, run_flow
from stepgraph.compiler.lowering.cut import cut
from stepgraph.compiler.lowering.lift_region import lift_region
from stepgraph.compiler.marking.traced_model import marked_graph
from stepgraph.compiler.models import family_of
from stepgraph.compiler.specializing.specialize import rewrite_model
from stepgraph.config import CompileConfig
from stepgraph.plan import CachePlan
from stepgraph.plan.corrections import Forecast
from stepgraph.runtime.program.packed_linear import PACKED, packed_columns, packs
from stepgraph.tolerances import OP, tolerance

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
    assert rewrite_model(marked, model, plan, CompileConfig("eager")) is marked


def test_a_projection_may_be_split_in_one_block_and_reused_in_another(flux, flow):
    plan = flux_plan(flux, flow, {"single_transformer_blocks.0.attn": "CRCR", "single_transformer_blocks.1.proj_out": "CCRR"})
    exe = run(flux, plan, flow)
    assert [projections(exe, s) for s in range(STEPS)] == [
        Counter(whole=1, parts=2), Counter(whole=1, parts=1), Counter(whole=0, parts=2), Counter(whole=0, parts=1),
    ]  # fmt: skip


def test_halves_are_products_with_packed_columns_in_the_region_of_their_block(flux, flow):
    if not packs(torch.zeros(1, C), torch.zeros(C, C)):
        pytest.skip("oneDNN's packed linear maps are not there")
    exe = sg.compile(flux, flux_plan(flux, flow, halves("CRCR", "CCRR")), flux_inputs(2), backend="eager")
    whole = [flux.single_transformer_blocks[i].proj_out.weight for i in range(2)]
    for step, ranges in enumerate([[(0, C), (C, 5 * C)], [(C, 5 * C)], [(0, C)], []]):
        gm = exe.default.variants[exe.default.rows[step]].graph
        pieces = cut(gm, family_of(flux).stacks[1].holds)
        regions = [lift_region(gm, piece, prepack=True) for piece in pieces]
        found = [[n.args[3:] for n in region.graph.nodes if n.target is packed_columns] for region in regions]
        assert [own for own in found if own] == ([ranges] * 2 if ranges else []), step
        read = [w for r, own in zip(regions, found, strict=True) if own for w in r.weights if any(w is one for one in whole)]
        assert [id(w) for w in read] == ([id(w) for w in whole] if ranges else [])


@pytest.mark.slow
def test_halves_run_in_compiled_regions_and_follow_the_weights(flow, monkeypatch):
    torch.manual_seed(0)
    small = {**FLUX, "num_layers": 1, "num_single_layers": 1}
    model, packed = diffusers.FluxTransformer2DModel(**small).eval(), list[tuple[int, ...]]()

    def pack(weight, made=PACKED.pack):
        packed.append(tuple(weight.shape))
        return made(weight)

    monkeypatch.setattr(PACKED, "pack", pack)
    plan, inputs = flux_plan(model, flow, {"single_transformer_blocks.0.attn": "CR"}, steps=2), flux_inputs(2)
    exe = sg.compile(model, plan, inputs)

    def compare() -> list[torch.Tensor]:
        with torch.no_grad():
            got = run_flow(exe.session(), flow, plan.steps, inputs)
            wanted = run_flow(FluxOracle.of(model, plan), flow, plan.steps, inputs)
        for value, expected in zip(got, wanted, strict=True):
            assert error(value, expected) < SAME_RUN
        return got

    before = compare()
    packed.clear()
    with torch.no_grad():
        model.single_transformer_blocks[0].proj_out.weight.mul_(1.5)
    assert error(compare()[-1], before[-1]) > 1e-3
    if packs(torch.zeros(1, C), torch.zeros(C, C)):
        assert sorted(packed) == [(C, C), (C, 4 * C)]


def test_a_product_with_packed_columns_is_the_linear_map():
    if not packs(torch.zeros(1, C), torch.zeros(C, C)):
        pytest.skip("oneDNN's packed linear maps are not there")
    x, linear = torch.randn(2, 5, 7), torch.nn.Linear(20, 9)
    with torch.no_grad():
        for bias in (linear.bias, None):
            expected = torch.nn.functional.linear(
                x.double(), linear.weight.double()[:, 3:10], None if bias is None else bias.double()
            )
            for _ in range(2):
                assert error(packed_columns(x, linear.weight, bias, 3, 10), expected.float()) < tolerance(OP, torch.float32)
        linear.weight.mul_(2)
        assert error(packed_columns(x, linear.weight, None, 3, 10), 2 * expected.float()) < tolerance(OP, torch.float32)
