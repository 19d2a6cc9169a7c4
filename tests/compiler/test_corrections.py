"""LOWRANK and FORECAST, compiled: against the oracle, against their own limits, and what is refused."""

from dataclasses import replace

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepgraph as sg
from helpers.corrections import LINEARS, both, factors_of, maps_of, plan_of
from helpers.distance import SAME_RUN, error
from helpers.families import FLUX, UVIT, flux_inputs, run_uvit, uvit_inputs
from helpers.oracle import run_loop
from helpers.oracle_families import FluxOracle, UVitOracle, run_flow
from helpers.tiny import inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.errors import PlanError
from stepgraph.plan.corrections import Forecast
from stepgraph.plan.liveness import traffic
from stepgraph.plan.report import row_macs

STEPS = 6


# -- LOWRANK -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "actions",
    [
        {"attn": "CLCLCL", "ff": "CLCLCL"},
        {"attn": "CLLLCL", "ff": "CRLRCL"},
        {"attn": "CLRCLL", "hidden": "CCCRCC", "ff": "CCLCRL"},
    ],
)
@pytest.mark.parametrize("whole", [(), ("ff",), ("attn1", "ff")])
def test_lowrank_plans_equal_the_oracle(dit, actions, whole):
    maps = maps_of(dit, whole=whole)
    got, wanted, exe = both(dit, plan_of(dit, actions), maps)
    # The oracle takes B (x - C(x)), the graphs B x - B C(x).
    assert error(got, wanted) < 1e-6
    if not whole:
        stale = both(dit, plan_of(dit, {kind: letters.replace("L", "R") for kind, letters in actions.items()}))[0]
        assert error(stale, wanted) > 1e-4
    assert set(exe.providers()) == {"lowrank_delta by reference", "lowrank_input by reference"}


@pytest.mark.parametrize("name", ["dpm++", "euler", "heun"])
@pytest.mark.parametrize("guidance", ["batched", "separate"])
def test_lowrank_on_other_samplers(dit, name, guidance):
    scheduler = tiny_scheduler(name)
    steps = len(sg.make_plan("full", model=dit, scheduler=scheduler, steps=4).rows)
    plan = sg.make_plan(
        "manual", model=dit, scheduler=scheduler, steps=4, guidance=guidance, actions={"attn": ("CL" * steps)[:steps]}
    )
    got, wanted, _ = both(dit, plan, maps_of(dit), scheduler=scheduler, guidance_scale=3.0)
    assert error(got, wanted) < 1e-6


def test_an_unchanged_input_gives_the_stored_value(dit):
    """Zero drift: at the second of two equal calls nothing is added, to the last bit."""
    plan = plan_of(dit, {"attn": "CL", "ff": "CL"})
    session = sg.compile(dit, plan, inputs(2), backend="eager", exact=True, factors=factors_of(dit, maps_of(dit))).session()
    first, second = session(**inputs(2)), session(**inputs(2))
    assert torch.equal(first.sample, second.sample)


def test_full_rank_is_compute(dit):
    """Factors whose product is the weight itself leave nothing out."""
    maps = {}
    for path in maps_of(dit):
        weight = dit.get_submodule(path).weight.detach()
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        maps[path] = ((u * s).float(), v.float())
    got = both(dit, plan_of(dit, {"attn": "CLLLCL", "ff": "CLLLLL"}), maps)[0]
    eager = run_loop(dit, tiny_scheduler("ddim"), noise(2), 6, 1.0, labels(1, 2))[0]
    assert error(got, eager) < SAME_RUN


@pytest.mark.slow
def test_lowrank_is_deterministic_under_inductor(dit):
    late = {(2, f"transformer_blocks.{b}.ff"): (("y1",), ((1.0,),)) for b in (0, 1)}
    plan, maps = plan_of(dit, {"attn": "CLR", "ff": "CLF"}, late), maps_of(dit)
    exact = both(dit, plan, maps)[0]
    compiled, wanted, exe = both(dit, plan, maps, backend="inductor", exact=False)
    assert exe.config.backend == "inductor"
    run = lambda: run_loop(exe.session(), tiny_scheduler("ddim"), noise(2), 3, 1.0, labels(1, 2))[0]  # noqa: E731
    assert torch.equal(run(), compiled)
    assert torch.equal(run(), compiled)
    # A program that is compiled anew gives the same bits too.
    assert torch.equal(both(dit, plan, maps, backend="inductor", exact=False)[0], compiled)
    assert error(compiled, exact) < SAME_RUN
    assert error(compiled, wanted) < SAME_RUN


@pytest.mark.parametrize("rank", [4, 30])
def test_costs_are_the_formulas(dit, rank):
    """Increment-calibrated caching's own formulas: 2 r C per square map and token, softmax attention as ever.

    At rank 30 the increments cost more than the maps themselves.
    """
    width, tokens = 32, 16
    maps = maps_of(dit, rank)
    plan = plan_of(dit, {"attn": "CLRC", "ff": "CCCL"})
    exe = both(dit, plan, maps)[2]
    whole = plan.header.macs
    attention, square = 2 * tokens * tokens * width, tokens * width
    linear = {"attn": 4 * square * width, "ff": 8 * square * width}
    increment = {"attn": 4 * 2 * rank * square, "ff": 2 * rank * square * (1 + 4)}
    projection = {"attn": 4 * rank * square, "ff": 5 * rank * square}
    steps = [
        whole + 2 * projection["attn"],
        whole + 2 * (increment["attn"] - linear["attn"]),
        whole - 2 * (linear["attn"] + attention) + 2 * projection["ff"],
        whole + 2 * (increment["ff"] - linear["ff"]),
    ]
    assert list(exe.macs().per_step) == [2 * macs for macs in steps]
    rows = [row_macs(exe.plan, row, moved.stores) for row, moved in zip(exe.plan.rows, traffic(exe.plan), strict=True)]
    assert rows == steps
    assert sg.CachePlan.from_json(exe.plan.to_json()) == exe.plan
    # float32 outputs of four maps of the attention, and its two inputs in rank space (3 r and r numbers a token).
    assert exe.plan.increments[plan.index("transformer_blocks.0.attn1")].bytes == 4 * tokens * (4 * width + 4 * rank)


@pytest.mark.slow
def test_published_costs_of_dit_xl():
    """Table of the method's repository: .0140, .0235, .0330, .0425 T multiply-accumulates at rank 64, 128, 192, 256.

    Its figures are rounded, and diffusers embeds the timestep in every block, which is 5e-5 T.
    """
    from stepgraph.compiler.entry.load_model import load_model
    from stepgraph.compiler.marking.traced_model import marked_graph
    from stepgraph.compiler.specializing.bind_factors import group_maps, increment_of

    model = load_model("dit-xl-2-256:random", "meta")
    marked = marked_graph(model, None)
    header = sg.make_plan("full", model=model, scheduler=tiny_scheduler("ddim"), steps=2).header
    plan = sg.CachePlan.build(header, marked.sites, {"attn": "CL", "ff": "CL"})
    for rank, published in ((64, 0.0140), (128, 0.0235), (192, 0.0330), (256, 0.0425)):
        maps = {}
        for i in range(28):
            for name in LINEARS:
                linear = model.get_submodule(f"transformer_blocks.{i}.{name}")
                maps[f"transformer_blocks.{i}.{name}"] = (
                    torch.zeros(1, 1).expand(linear.out_features, rank), torch.zeros(1, 1).expand(rank, linear.in_features),
                )  # fmt: skip
        factors = sg.Factors(header.model, header.fingerprint, header.dtype, "svd", {}, maps)
        corrected = [i for i, site in enumerate(plan.sites) if site.kind in ("attn", "ff")]
        groups = group_maps(marked, model, corrected, factors)
        increments = {i: increment_of(marked, i, own) for i, own in groups.items()}
        bound = replace(plan, increments=increments)
        assert row_macs(bound, bound.rows[1]) / 1e12 == pytest.approx(published, abs=1e-4)
        assert row_macs(bound, bound.rows[0]) / 1e12 == pytest.approx(0.11862, abs=1e-4)


FLUX_LINEARS = {
    "transformer_blocks": (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0",
        "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    ),
    "single_transformer_blocks": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"),
}  # fmt: skip


@pytest.mark.parametrize(
    "actions",
    [
        {"attn": "CLLC", "context_attn": "CLLC", "ff": "CLCL", "context_ff": "CLRL", "mlp": "CLLL", "proj_out": "CCLL"},
        {"attn": "CLCC", "context_attn": "CLCC", "mlp": "CRCL", "proj_out": "CFCL", "ff": "CFCL", "hidden": "CCCC"},
    ],
)
def test_lowrank_and_forecasts_on_flux(actions):
    """Joint attention (image and text projected apart), an MLP projected outside its site, a site that is a linear map."""
    torch.manual_seed(0)
    model, scheduler = diffusers.FluxTransformer2DModel(**FLUX).eval(), diffusers.FlowMatchEulerDiscreteScheduler()
    maps = {}
    for blocks, names in FLUX_LINEARS.items():
        for path in (f"{blocks}.{number}.{name}" for number in (0, 1) for name in names):
            linear = model.get_submodule(path)
            maps[path] = (torch.randn(linear.out_features, 4) / 8, torch.randn(4, linear.in_features) / 8)
    inputs = flux_inputs(2)
    options = {"guidance": "none", "example_inputs": inputs}
    plan = sg.make_plan("manual", model=model, scheduler=scheduler, steps=4, actions=actions, **options)
    half = {(s, i): Forecast(("y1",), ((0.5,),)) for s, row in enumerate(plan.rows) for i, a in enumerate(row) if a == "F"}
    plan = replace(plan, forecasts=half)
    header = plan.header
    factors = sg.Factors(header.model, header.fingerprint, header.dtype, "svd", {}, maps)
    exe = sg.compile(model, plan, inputs, backend="eager", exact=True, factors=factors)
    got = run_flow(exe.session(), scheduler, 4, inputs)
    wanted = run_flow(FluxOracle.of(model, plan, maps), scheduler, 4, inputs)
    assert error(torch.stack(got), torch.stack(wanted)) < 1e-6
    rows = [row_macs(exe.plan, row, moved.stores) for row, moved in zip(exe.plan.rows, traffic(exe.plan), strict=True)]
    assert list(exe.macs().per_step) == [2 * macs for macs in rows]
    mixed = {"attn": "CL", "context_attn": "CR"}
    with pytest.raises(PlanError, match="LOWRANK, but not all outputs of the same call are"):
        sg.make_plan("manual", model=model, scheduler=scheduler, steps=2, actions=mixed, **options)


UVIT_ACTIONS = [
    {"attn": "CLCL", "ff": "CLLL"},
    {"transformer_mid_block.attn1": "CLLC", "transformer_out_blocks.0.block.ff": "CRLL", "hidden": "CCCC"},
]


@pytest.mark.parametrize("actions", UVIT_ACTIONS)
def test_lowrank_on_u_vit(actions):
    """Blocks in halves with skip connections: at full rank it is COMPUTE, at a low one the paper's formula."""
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel

    torch.manual_seed(0)
    model, scheduler = UTransformer2DModel(**UVIT).eval(), tiny_scheduler("ddim")
    plan = sg.make_plan("manual", model=model, scheduler=scheduler, steps=4, guidance="none", actions=actions)
    header, maps, exact = plan.header, {}, {}
    corrected = [s.path for i, s in enumerate(plan.sites) if any(row[i] == "L" for row in plan.rows)]
    for path, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and any(path.startswith(f"{site}.") for site in corrected):
            u, s, v = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
            exact[path] = ((u * s).float(), v.float())
            maps[path] = (torch.randn(linear.out_features, 3) / 8, torch.randn(3, linear.in_features) / 8)

    def run(plan, maps):
        factors = sg.Factors(header.model, header.fingerprint, header.dtype, "svd", {}, maps)
        exe = sg.compile(model, plan, uvit_inputs(2), backend="eager", exact=True, factors=factors)
        return torch.stack(run_uvit(exe.session(), scheduler, 4, uvit_inputs(2)))

    def other(letter, instead):
        return replace(plan, rows=tuple(row.replace(letter, instead) for row in plan.rows))

    wanted = torch.stack(run_uvit(UVitOracle.of(model, plan, maps), scheduler, 4, uvit_inputs(2)))
    assert error(run(plan, maps), wanted) < 1e-6
    stale = torch.stack(run_uvit(UVitOracle.of(model, other("L", "R")), scheduler, 4, uvit_inputs(2)))
    assert error(stale, wanted) > 1e-4
    # Where nothing else is reused, factors that lack nothing leave the eager model's run.
    with torch.no_grad():
        eager = torch.stack(run_uvit(model, scheduler, 4, uvit_inputs(2)))
    assert error(run(other("R", "C"), exact), eager) < SAME_RUN


def test_a_site_without_a_linear_map(dit):
    with pytest.raises(PlanError, match="action 'L' is not possible for kind hidden"):
        plan_of(dit, {"hidden": "CL"})
    torch.manual_seed(0)
    model, scheduler = diffusers.FluxTransformer2DModel(**FLUX).eval(), diffusers.FlowMatchEulerDiscreteScheduler()
    # Reused together with its projection's other half: what only the MLP needs is then its own projection still.
    options = {"guidance": "none", "example_inputs": flux_inputs()}
    plan = sg.make_plan("manual", model=model, scheduler=scheduler, steps=2, actions={"mlp": "CL"}, **options)
    header = plan.header
    factors = sg.Factors(header.model, header.fingerprint, header.dtype, "svd", {}, {})
    with pytest.raises(PlanError, match=r"site single_transformer_blocks\.0\.act_mlp: the factors have none for .*proj_mlp"):
        sg.compile(model, plan, flux_inputs(), backend="eager", factors=factors)


# -- FORECAST ------------------------------------------------------------------------------------------------------------

TWO = (("y1", "y2"), ((1.5, -0.5),))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("attn", ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]),
        ("block", ["transformer_blocks.0", "transformer_blocks.1"]),
        ("stack_residual", ["stack_residual"]),
        ("hidden", ["hidden"]),
        ("output", ["output"]),
    ],
)
def test_forecasts_equal_the_oracle(dit, kind, names):
    forecasts = {(step, name): TWO for step in (3, 4) for name in names}
    forecasts |= {(5, name): (("y2", "y1"), ((0.25, 0.5),)) for name in names} if kind != "block" else {}
    actions = {kind: "CCRFFF"} if kind != "block" else {"transformer_blocks.1": "CCRFFC"}
    if kind == "block":
        forecasts = {key: value for key, value in forecasts.items() if key[1] == "transformer_blocks.1"}
    got, wanted, exe = both(dit, plan_of(dit, actions, forecasts))
    assert torch.equal(got, wanted)
    assert exe.memory().peak_slot_bytes == 2 * exe.plan.summary().peak_slot_bytes


@pytest.mark.parametrize("guidance", ["batched", "separate"])
def test_an_output_is_forecast_from_the_models_input_too(dit, guidance):
    branches = 2 if guidance == "separate" else 1
    rows = tuple((1.5 + b, -0.5, 0.125, -0.25 + b) for b in range(branches))
    forecasts = {(2, "output"): (("y1", "y2", "x0", "x1"), rows), (4, "output"): (("y1", "x0"), tuple(r[1:3] for r in rows))}
    plan = plan_of(dit, {"output": "CCFCFC", "ff": "CRCRCC"}, forecasts, guidance=guidance)
    # With the output forecast, what lies before it is dead.
    got, wanted, _ = both(dit, sg.CachePlan.from_json(plan.to_json()), guidance_scale=3.0)
    assert torch.equal(got, wanted)


def test_coefficients_per_channel(dit):
    tables = {f"stack_residual/{step}": torch.randn(2, 32, generator=torch.Generator().manual_seed(step)) for step in (1, 3)}
    forecasts = {(step, "stack_residual"): (("y1", "1"), ()) for step in (1, 3)}
    got, wanted, _ = both(dit, plan_of(dit, {"stack_residual": "CFCF"}, forecasts), tables=tables)
    assert torch.equal(got, wanted)


def test_an_increment_around_a_forecast(dit):
    names = [f"transformer_blocks.{b}.{child}" for b in (0, 1) for child in ("attn1", "ff")]
    forecasts = {(step, name): TWO for step in (3, 4) for name in names}
    plan, maps = plan_of(dit, {"attn": "CCLLLC", "ff": "CCLLLC"}, forecasts), maps_of(dit)
    got, wanted, exe = both(dit, plan, maps)
    assert error(got, wanted) < 1e-6
    assert error(both(dit, replace(plan, forecasts={}), maps)[0], wanted) > 1e-4
    assert exe.memory().peak_slot_bytes == 2 * exe.plan.summary().peak_slot_bytes


def test_steps_with_the_same_terms_share_a_graph(dit):
    forecasts = {(step, "output"): (("y1", "y2"), ((1.0 + step, -float(step)),)) for step in (2, 4, 5)}
    exe = both(dit, plan_of(dit, {"output": "CCFCFF"}, forecasts))[2]
    # All computed steps but the first two overwrite the older value; the three forecasts differ in numbers only.
    assert len({exe.default.rows[step] for step in (2, 4, 5)}) == 1


@settings(max_examples=10)
@given(data=st.data())
def test_random_plans_equal_the_oracle(dit, data):
    model = dit
    maps = maps_of(model, whole=("ff",) if data.draw(st.booleans()) else ())
    actions = {kind: "C" + data.draw(st.text("CRLF", min_size=STEPS - 1, max_size=STEPS - 1)) for kind in ("attn", "ff")}
    actions["output"] = "C" + data.draw(st.text("CCCF", min_size=STEPS - 1, max_size=STEPS - 1))
    plan = plan_of(model, actions)
    forecasts = {}
    for i in range(len(plan.sites)):
        for step, row in enumerate(plan.rows):
            stored = sum(earlier[i] == "C" for earlier in plan.rows[:step])
            if row[i] == "F" or (row[i] == "L" and data.draw(st.booleans())):
                terms = tuple(f"y{age}" for age in range(1, data.draw(st.integers(1, min(stored, 3))) + 1))
                forecasts[step, i] = Forecast(terms, (tuple(data.draw(st.sampled_from([-0.5, 0.25, 1.0])) for _ in terms),))
    got, wanted, exe = both(model, replace(plan, forecasts=forecasts), maps)
    assert error(got, wanted) < 2e-6
    assert exe.memory().peak_slot_bytes == 2 * exe.plan.summary().peak_slot_bytes


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_forecasts_that_cannot_be(dit):
    cases = {
        "reads y2, but only 1 values have been computed": ({"ff": "CFCC"}, {(1, "transformer_blocks.0.ff"): TWO}),
        "is given for the action REUSE": ({"ff": "CCRC"}, {(2, "transformer_blocks.0.ff"): TWO}),
        "only a forecast of the model's output reads its input": (
            {"ff": "CFCC"}, {(1, "transformer_blocks.0.ff"): (("y1", "x0"), ((1.0, 1.0),))},
        ),
        "has 2 rows of coefficients; expected one for each of the branches": (
            {"output": "CFCC"}, {(1, "output"): (("y1",), ((1.0,), (1.0,)))},
        ),
        "has one coefficient per term": ({"ff": "CLCC"}, {(1, "transformer_blocks.0.ff"): (("y1", "1"), ())}),
    }  # fmt: skip
    for message, (actions, forecasts) in cases.items():
        with pytest.raises(PlanError, match=message):
            plan_of(dit, actions, forecasts)
    for terms, rows in (
        (("y1", "y1"), ()),
        (("x0", "y1"), ((1.0, 1.0),)),
        (("x0",), ((1.0,),)),
        (("y1",), ((1.0, 2.0),)),
        (("z",), ()),
        (("y1",), ((float("nan"),),)),
    ):
        with pytest.raises(PlanError, match="the forecast of"):
            Forecast(terms, rows)


def test_a_forecast_without_coefficients_does_not_compile(dit):
    with pytest.raises(sg.CompileError, match=r"step 1, site transformer_blocks\.0\.ff: FORECAST without coefficients"):
        both(dit, plan_of(dit, {"ff": "CF"}))


def test_factors_that_do_not_fit(dit):
    plan, maps = plan_of(dit, {"ff": "CL"}), maps_of(dit)
    compiled = lambda plan, factors: sg.compile(dit, plan, inputs(), backend="eager", factors=factors)  # noqa: E731
    with pytest.raises(PlanError, match=r"LOWRANK, first at site transformer_blocks\.0\.ff, but no factors are given"):
        compiled(plan, None)
    with pytest.raises(PlanError, match="is bound to the factors 0123456789abcdef, but given are"):
        compiled(plan.with_header(factors="0123456789abcdef"), factors_of(dit, maps))
    with pytest.raises(PlanError, match=r"the factors have none for transformer_blocks\.1\.ff\.net\.2"):
        compiled(plan, factors_of(dit, {k: v for k, v in maps.items() if k != "transformer_blocks.1.ff.net.2"}))
    with pytest.raises(PlanError, match=r"have rank 40, more than the map \[32, 128\] can have"):
        factors_of(dit, maps | {"transformer_blocks.0.ff.net.2": (torch.randn(32, 40), torch.randn(40, 128))})
    wrong = maps | {"transformer_blocks.0.ff.net.2": (torch.randn(32, 4), torch.randn(4, 64))}
    with pytest.raises(PlanError, match=r"are for a map \[32, 64\]; this model's is \[32, 128\]"):
        compiled(plan, factors_of(dit, wrong))
    wrong = maps | {"transformer_blocks.0.ff": (torch.randn(32, 4), torch.randn(4, 64))}
    with pytest.raises(PlanError, match=r"transformer_blocks\.0\.ff are for a map \[32, 64\]; the site's is \[32, 32\]"):
        compiled(plan, factors_of(dit, wrong))
    other = tiny_dit(seed=1)
    with pytest.raises(PlanError, match="other weights"):
        compiled(plan, factors_of(other, maps_of(other)))
    with pytest.raises(PlanError, match="float32"):
        compiled(plan, replace(factors_of(dit, maps), dtype="bfloat16"))
