"""FLUX and U-ViT: their sites, what these cost, and compiled plans against the oracle, bit for bit."""

from itertools import count

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepgraph as sg
from helpers.distance import SAME_RUN, error
from helpers.families import (
    FLUX,
    IMAGE,
    STEPS,
    TEXT,
    UVIT,
    WIDTH,
    compare,
    flux_inputs,
    flux_plan,
    random_rows,
    run_uvit,
    uvit_inputs,
)
from helpers.oracle_families import FluxOracle, UVitOracle, run_flow
from stepgraph.compiler.calibration.time_sites import time_sites
from stepgraph.compiler.entry.load_model import load_model, load_scheduler, load_to_plan
from stepgraph.compiler.marking.traced_model import marked_graph
from stepgraph.compiler.models import FAMILIES, family_of
from stepgraph.errors import CompileError, PlanError
from stepgraph.node_facts import MARKER, output_of
from stepgraph.plan import CachePlan


@pytest.fixture(scope="module")
def flux() -> diffusers.FluxTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(**FLUX).eval()


@pytest.fixture(scope="module")
def uvit():
    torch.manual_seed(0)
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel

    return UTransformer2DModel(**UVIT).eval()


@pytest.fixture
def flow() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler()


# -- FLUX ----------------------------------------------------------------------------------------------------------------


def test_flux_sites_lie_where_its_blocks_compute_them(flux):
    marked = marked_graph(flux, flux_inputs())
    double = [
        (f"transformer_blocks.{i}.{name}", kind)
        for i in range(2)
        for name, kind in (("attn", "attn"), ("attn:1", "context_attn"), ("ff", "ff"), ("ff_context", "context_ff"))
    ]
    single = [
        (f"single_transformer_blocks.{i}.{name}", kind)
        for i in range(2)
        for name, kind in (("act_mlp", "mlp"), ("attn", "attn"), ("proj_out", "proj_out"))
    ]
    whole = [(kind, kind) for kind in ("stack_residual", "hidden", "output")]
    assert [(site.name, site.kind) for site in marked.sites] == double + single + whole


@pytest.mark.parametrize("batch", [1, 3])
def test_flux_sites_cost_what_their_formulas_say(flux, batch):
    n, c = IMAGE + TEXT, WIDTH
    attention = 2 * n * n * c
    expected = {
        "transformer_blocks.0.attn": 3 * n * c * c + attention + IMAGE * c * c,
        "transformer_blocks.0.attn:1": TEXT * c * c,
        "transformer_blocks.0.ff": 8 * IMAGE * c * c,
        "transformer_blocks.0.ff_context": 8 * TEXT * c * c,
        "single_transformer_blocks.1.attn": 3 * n * c * c + attention,
        "single_transformer_blocks.1.act_mlp": 4 * n * c * c,
        "single_transformer_blocks.1.proj_out": 3 * n * c * c + attention + 4 * n * c * c + 5 * n * c * c,
    }
    marked = marked_graph(flux, flux_inputs(batch))
    sites = {site.name: site for site in marked.sites}
    assert {name: sites[name].macs for name in expected} == expected
    sizes = {"transformer_blocks.0.attn": IMAGE * c, "transformer_blocks.0.attn:1": TEXT * c, "hidden": IMAGE * c,
             "single_transformer_blocks.0.attn": n * c, "single_transformer_blocks.0.act_mlp": 4 * n * c}  # fmt: skip
    assert {name: sites[name].bytes for name in sizes} == {name: 4 * size for name, size in sizes.items()}
    # The head's projection, and its modulation and the time embedding, remain when the tokens before it are reused.
    assert sites["output"].macs == marked.macs
    assert sites["hidden"].macs - sites["stack_residual"].macs == IMAGE * 4 * c


@pytest.mark.parametrize(
    "kind", ["attn", "context_attn", "ff", "context_ff", "mlp", "proj_out", "stack_residual", "hidden", "output"]
)
def test_flux_reuses_every_kind_by_itself(flux, flow, kind):
    # Of a joint attention both outputs are named; an attention alone is reused in single blocks only.
    actions = {kind: "CRCR"} | ({"attn": "CRCR"} if kind == "context_attn" else {})
    plan = flux_plan(flux, flow, actions)
    assert any("R" in row for row in plan.rows)
    oracle = FluxOracle.of(flux, plan)
    compare(flux, plan, oracle, flow, flux_inputs(2), run_flow)
    assert sum(oracle.executed[1].values()) < sum(oracle.executed[0].values())
    assert (kind == "output") == (not oracle.executed[1])


@pytest.mark.slow
@settings(max_examples=12)
@given(data=st.data())
def test_flux_runs_random_plans(flux, data):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    full = flux_plan(flux, scheduler, {}, steps=5)
    plan = CachePlan(full.header, full.sites, data.draw(random_rows(full.sites, 5)))
    inputs = flux_inputs(data.draw(st.sampled_from([1, 3])))
    compare(flux, plan, FluxOracle.of(flux, plan), scheduler, inputs, run_flow)


def test_flux_computing_everything_is_the_eager_model(flux, flow):
    plan = flux_plan(flux, flow, {})
    exe = compare(flux, plan, FluxOracle.of(flux, plan), flow, flux_inputs(2), run_flow)
    eager = run_flow(flux, flow, STEPS, flux_inputs(2))
    assert all(map(torch.equal, eager, run_flow(exe.session(), flow, STEPS, flux_inputs(2))))


def test_reuse_of_different_kinds_differs(flux, flow):
    kinds = ({}, {"ff": "CRRR"}, {"context_ff": "CRRR"}, {"mlp": "CRRR"}, {"attn": "CRRR"}, {"hidden": "CRRR"})
    finals = [
        run_flow(FluxOracle.of(flux, plan), flow, STEPS, flux_inputs())[-1]
        for plan in (flux_plan(flux, flow, k) for k in kinds)
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(finals) for b in finals[:i])


def test_magcache_reuses_the_residual_of_flux(flux, flow):
    plan = sg.make_plan(
        "magcache", model=flux, scheduler=flow, steps=6, guidance="none", example_inputs=flux_inputs(),
        ratios=[1.0] * 6, retention=0.2, max_skip=2,
    )  # fmt: skip
    column = "".join(row[plan.index("stack_residual")] for row in plan.rows)
    assert column == "CRRCRR"
    compare(flux, plan, FluxOracle.of(flux, plan), flow, flux_inputs(), run_flow)


def test_a_joint_attention_is_reused_with_all_its_outputs_or_not_at_all(flux, flow):
    plan = flux_plan(flux, flow, {"transformer_blocks.0.attn": "CRRR", "transformer_blocks.0.attn:1": "CCRC"})
    columns = {
        name: "".join(row[plan.index(name)] for row in plan.rows)
        for name in ("transformer_blocks.0.attn", "transformer_blocks.0.attn:1")
    }
    assert set(columns.values()) == {"CCRC"}
    mixed = list(plan.rows)
    mixed[1] = mixed[1].replace("C", "R", 1)
    with pytest.raises(
        PlanError, match=r"step 1, site transformer_blocks.0.attn: REUSE, but transformer_blocks.0.attn:1 .* only if all"
    ):
        CachePlan(plan.header, plan.sites, tuple(mixed))


def test_a_reused_projection_leaves_nothing_to_do_before_it(flux, flow):
    plan = flux_plan(flux, flow, {"proj_out": "CRCR", "mlp": "CRRR"})
    at = {name: plan.index(f"single_transformer_blocks.1.{name}") for name in ("act_mlp", "attn", "proj_out")}
    assert [[row[i] for i in at.values()] for row in plan.rows[:3]] == [["C", "C", "C"], [".", ".", "R"], ["R", "C", "C"]]
    row = plan.rows[1]
    alive = row[: at["attn"]] + "C" + row[at["attn"] + 1 :]
    with pytest.raises(PlanError, match=r"single_transformer_blocks.1.attn: COMPUTE inside the reused site single_.*proj_out"):
        CachePlan(plan.header, plan.sites, (plan.rows[0], alive, *plan.rows[2:]))


def test_positions_have_no_batch(flux, flow):
    plan = flux_plan(flux, flow, {"ff": "CRCR"})
    shapes = plan.header.shapes
    assert (shapes["img_ids"], shapes["txt_ids"], shapes["hidden_states"]) == ((IMAGE, 3), (TEXT, 3), (IMAGE, 4))
    assert CachePlan.from_json(plan.to_json()) == plan
    exe = sg.compile(flux, plan, dict(reversed(flux_inputs(2).items())), backend="eager", exact=True)
    assert exe.default.batch == 2
    assert sg.compile(flux, plan, flux_inputs(image=20), backend="eager", exact=True).default.batch == 1
    # What was measured holds for the sizes that it was measured at.
    calibrated = plan.with_header(measured="choice")
    with pytest.raises(PlanError, match=r"img_ids of shape \[16, 3\]; given is \[20, 3\]"):
        sg.compile(flux, calibrated, {**flux_inputs(), "img_ids": torch.zeros(20, 3)}, backend="eager")
    with pytest.raises(PlanError, match=r"hidden_states of shape \[batch, 16, 4\]; given is \[batch, 20, 4\]"):
        sg.compile(flux, calibrated, flux_inputs(image=20), backend="eager")
    with pytest.raises(PlanError, match="disagree on the batch size"):
        sg.compile(flux, plan, {**flux_inputs(2), "timestep": torch.zeros(3)}, backend="eager")


def test_another_number_of_attention_outputs_is_refused(flux):
    attention = flux.transformer_blocks[1].attn
    usual = attention.processor

    def with_a_third(*args, **kwargs):
        image, text = usual(*args, **kwargs)
        return image, text, image

    attention.processor = with_a_third
    try:
        with pytest.raises(
            CompileError, match=r"transformer_blocks.1.attn returned 3 tensors; expected 2 \(attn, context_attn\)"
        ):
            marked_graph(flux, flux_inputs())
    finally:
        attention.processor = usual


def test_flux_is_not_sampled_by_name(flux, flow):
    with pytest.raises(CompileError, match="conditioned on text embeddings"):
        family_of(flux).conditioning(FLUX, 1, torch.device("cpu"))


def test_the_time_of_a_joint_attention_stands_with_its_first_output(flux, monkeypatch):
    ticks = count()
    # A clock that goes on by a second whenever it is looked at: every operation takes one.
    monkeypatch.setattr("stepgraph.compiler.calibration.time_sites.time.perf_counter", lambda: float(next(ticks)))
    marked = marked_graph(flux, flux_inputs())
    ends = {node.meta[MARKER]: node for node in marked.graph.nodes if MARKER in node.meta}

    def needed(*cut: int) -> int:
        """How many nodes the output depends on where the values of some markers are given."""
        pending, seen = [output_of(marked.graph)], set()
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                inner = node.args[:1] if MARKER in node.meta else node.all_input_nodes
                pending += [] if node in [ends[i] for i in cut] else inner
        return len(seen)

    seconds = time_sites(flux, marked, flux_inputs()) / 1000
    for image, text in ((0, 1), (4, 5)):
        assert marked.sites[text].kind == "context_attn"
        assert seconds[text] == needed() - needed(text)
        assert seconds[image] + seconds[text] == needed() - needed(image, text) > 10 * seconds[text]


@pytest.mark.slow
def test_flux_runs_compiled_by_inductor(flow):
    torch.manual_seed(0)
    flux = diffusers.FluxTransformer2DModel(**(FLUX | {"num_layers": 1, "num_single_layers": 1})).eval()
    plan = flux_plan(flux, flow, {"proj_out": "CR", "attn": "CR", "context_attn": "CR", "context_ff": "CR"}, steps=2)
    exe = sg.compile(flux, plan, flux_inputs(2), backend="inductor")
    wanted = run_flow(FluxOracle.of(flux, plan), flow, 2, flux_inputs(2))
    for value, expected in zip(run_flow(exe.session(), flow, 2, flux_inputs(2)), wanted, strict=True):
        assert error(value, expected) <= SAME_RUN


# -- U-ViT ---------------------------------------------------------------------------------------------------------------


def test_uvit_sites_lie_in_execution_order(uvit):
    paths = ["transformer_in_blocks.0", "transformer_in_blocks.1", "transformer_mid_block",
             "transformer_out_blocks.0.block", "transformer_out_blocks.1.block"]  # fmt: skip
    modules = [(f"{path}.{child}", kind) for path in paths for child, kind in (("attn1", "attn"), ("ff", "ff"))]
    whole = [(kind, kind) for kind in ("stack_residual", "hidden", "output")]
    assert [(site.name, site.kind) for site in marked_graph(uvit, uvit_inputs()).sites] == modules + whole


@pytest.mark.parametrize("kind", ["attn", "ff", "stack_residual", "hidden", "output"])
def test_uvit_reuses_every_kind_by_itself(uvit, ddim, kind):
    plan = sg.make_plan("manual", model=uvit, scheduler=ddim, steps=STEPS, guidance="none", actions={kind: "CRCR"})
    oracle = UVitOracle.of(uvit, plan)
    compare(uvit, plan, oracle, ddim, uvit_inputs(2), run_uvit)
    assert sum(oracle.executed[1].values()) < sum(oracle.executed[0].values())


@settings(max_examples=8)
@given(data=st.data())
def test_uvit_runs_random_plans(uvit, data):
    scheduler = diffusers.DPMSolverSinglestepScheduler(solver_order=2, lower_order_final=True)
    full = sg.make_plan("full", model=uvit, scheduler=scheduler, steps=6, guidance="none")
    plan = CachePlan(full.header, full.sites, data.draw(random_rows(full.sites, 6)))
    compare(uvit, plan, UVitOracle.of(uvit, plan), scheduler, uvit_inputs(2), run_uvit)


# -- sizes ---------------------------------------------------------------------------------------------------------------


def test_a_plan_made_without_weights_fits_them(flux, flow):
    with torch.device("meta"):
        hollow = diffusers.FluxTransformer2DModel(**FLUX).eval()
    plan = flux_plan(hollow, flow, {"mlp": "CRCR"})
    assert plan.header.fingerprint.endswith("/-")
    assert plan.sites == flux_plan(flux, flow, {}).sites
    compare(flux, plan, FluxOracle.of(flux, plan), flow, flux_inputs(), run_flow)


def test_random_sizes_are_planned_for_without_weights():
    model = load_to_plan("uvit-h-2:random", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    plan = sg.make_plan("interval", model=model, scheduler=load_scheduler("uvit-h-2:random"), steps=4)
    assert (plan.header.scheduler, plan.header.dtype) == ("DPMSolverSinglestepScheduler", "bfloat16")
    # The paper counts 501 M parameters and 133 G multiply-accumulates; the trunk is without two tokens, embeddings and head.
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(501e6, rel=0.01)
    assert plan.header.macs == pytest.approx(133e9, rel=0.01)
    assert load_to_plan("glyph-dit").pos_embed.proj.weight.device.type == "cpu"
    assert type(load_scheduler("flux-dev:random")).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert type(load_scheduler("dit-xl-2-256:random")).__name__ == "DDIMScheduler"


def test_every_random_size_has_inputs_for_its_configuration():
    names = [name for family in FAMILIES for name in family.random]
    assert {"flux-dev", "flux-schnell", "uvit-h-2", "dit-xl-2-256"} <= set(names)
    for name in names:
        model = load_model(f"{name}:random", "meta")
        inputs = sg.example_inputs(model, 2)
        batched = {key: value for key, value in inputs.items() if key not in family_of(model).unbatched}
        assert {len(value) for value in batched.values()} == {2}
        assert ("guidance" in inputs) == (name == "flux-dev")
