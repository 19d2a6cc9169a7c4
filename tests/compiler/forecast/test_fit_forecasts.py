"""Fitted forecasts, against plain loops that solve the same least squares with numpy."""

import copy
import json

import diffusers
import numpy as np
import pytest
import torch

import stepgraph as sg
from helpers.command_line import error_of, invoke
from helpers.distance import SAME_RUN, error
from helpers.oracle import Oracle, run_loop
from helpers.small_glyphs import save_small_glyph_dit
from helpers.tiny import inputs, labels, noise, tiny_dit, tiny_scheduler
from helpers.watched import watched_values
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.forecast.least_squares import least_squares
from stepgraph.errors import PlanError
from stepgraph.metrics import relative_errors

SEED, SAMPLES = 4, 3
COND, UNCOND = labels(5, 6, 7), {"class_labels": torch.full((SAMPLES,), 1000)}
GIVEN = COND | {"negative_class_labels": UNCOND["class_labels"]}
SCHEDULERS = {
    "ddim": lambda: tiny_scheduler("ddim"),
    "dpm++": lambda: tiny_scheduler("dpm++"),
    "euler": lambda: tiny_scheduler("euler"),
    "heun": lambda: tiny_scheduler("heun"),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "v": lambda: diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
}


def calibration_noise(shape=(4, 8, 8)):
    generator = torch.Generator().manual_seed(SEED)
    return torch.cat([torch.randn(1, *shape, generator=generator) for _ in range(SAMPLES)])


def unclipped(name):
    """A scheduler whose steps are straight lines in the output."""
    scheduler = SCHEDULERS[name]()
    return type(scheduler).from_config(scheduler.config, **({"clip_sample": False} if name == "ddim" else {}))


def skipping(model, scheduler, letters, guidance="batched", **actions):
    return sg.make_plan(
        "manual", model=model, scheduler=scheduler, steps=6, actions={"output": letters, **actions}, guidance=guidance
    )


def solved(columns, target):
    """numpy's least squares, with columns of length 1; directions that are mere rounding are left out."""
    matrix = np.stack([column.double().numpy().ravel() for column in columns], 1)
    lengths = np.linalg.norm(matrix, axis=0)
    return np.linalg.lstsq(matrix / lengths, target.double().numpy().ravel(), rcond=1e-5)[0] / lengths


@torch.no_grad()
def plain_whole_step(model, scheduler, letters, scale):
    """The rule and its fit, written down step by step on the eager model; the last latents.

    The fit is done in the sampler's states: on where each term alone would take it.
    """
    own, full = (copy.deepcopy(scheduler) for _ in range(2))
    for each in (own, full):
        each.set_timesteps(6)
    x = teacher = calibration_noise() * own.init_noise_sigma if hasattr(own, "init_noise_sigma") else calibration_noise()
    eta = {"eta": 0.0} if "DDIM" in type(scheduler).__name__ else {}

    def scaled(scheduler, x, t):
        return copy.deepcopy(scheduler).scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x

    def halves(scheduler, x, t):
        given = scaled(scheduler, x, t)
        parts = [model(given, timestep=t.expand(SAMPLES), **who).sample for who in ([COND, UNCOND] if scale > 1 else [COND])]
        return [part[:, :4] for part in parts]

    def guided(parts):
        return parts[0] if len(parts) == 1 else parts[1] + scale * (parts[0] - parts[1])

    def moved(scheduler, output, t, x):
        return copy.deepcopy(scheduler).step(output, t, x, **eta).prev_sample

    ys, xs = [], []
    for step, t in enumerate(own.timesteps):
        wanted = guided(halves(full, teacher, t))
        teacher = full.step(wanted, t, teacher, **eta).prev_sample
        if letters[step] == "C":
            ys.insert(0, halves(own, x, t))
            xs.insert(0, scaled(own, x, t))
            output = guided(ys[0])
        else:
            here = scaled(own, x, t)
            terms = [*ys[:2], [here] * len(ys[0]), [xs[0]] * len(ys[0])]
            columns = [guided(term) for term in terms]
            still = moved(own, torch.zeros_like(x), t, x)
            weights = solved([moved(own, column, t, x) - still for column in columns], teacher - still)
            output = sum(float(w) * column for w, column in zip(weights, columns, strict=True))
        x = own.step(output, t, x, **eta).prev_sample
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("guidance", "scale"), [("none", 1.0), ("batched", 2.0), ("separate", 2.0)])
def test_whole_step_is_the_plain_loop(dit, name, guidance, scale):
    """Its terms can depend on each other (DDIM's input now on the last output and input), its forecasts cannot."""
    scheduler = unclipped(name)
    letters = "CFCFFCFCFFC" if name == "heun" else "CFCFFC"
    plan = skipping(dit, scheduler, letters, guidance)
    given = GIVEN if scale > 1 else COND
    made = sg.fit_whole_step(plan, dit, scheduler, samples=SAMPLES, seed=SEED, guidance_scale=scale, conditioning=given)
    wanted = plain_whole_step(dit, scheduler, letters, scale)
    rows = SAMPLES * (2 if guidance == "batched" else 1)
    exe = sg.compile(dit, made, inputs(rows), backend="eager", exact=True)
    got = sg.sample(exe, scheduler, calibration_noise(), scale, **given)
    assert (got - wanted).norm() <= 1e-3 * wanted.norm()
    first = made.forecasts[1, made.index("output")]
    assert first.terms == ("y1", "x0", "x1")
    assert len(set(first.coefficients)) == 1
    assert len(first.coefficients) == len(made.header.branches)
    record = made.header.arguments["corrections"][-1]
    assert record["fallbacks"]["1"] == ["y1", "x0", "x1"]
    assert (made.header.seed, made.header.samples) == (SEED, SAMPLES)
    assert sg.CachePlan.from_json(made.to_json()) == made


@pytest.mark.parametrize("guidance", ["batched", "separate"])
def test_no_other_coefficients_come_nearer_to_the_full_run(dit, guidance):
    """At the last step, whose forecast only the result sees: any change makes it worse."""
    scheduler = unclipped("dpm++")
    plan = skipping(dit, scheduler, "CCFCCF", guidance, ff="CCCRCC")
    options = {"samples": SAMPLES, "seed": SEED, "guidance_scale": 2.0, "conditioning": GIVEN, "per_branch": True}
    made = sg.fit_whole_step(plan, dit, scheduler, **options)
    reference = sg.sample(dit, scheduler, calibration_noise(), 2.0, steps=6, **GIVEN)
    i = made.index("output")
    fitted = made.forecasts[5, i]
    rows = SAMPLES * (2 if guidance == "batched" else 1)
    exe = sg.compile(dit, made, inputs(rows), backend="eager", exact=True)
    constants = exe.default.constants[5]

    def error():
        return float((sg.sample(exe, scheduler, calibration_noise(), 2.0, **GIVEN) - reference).norm())

    least = error()
    assert len(set(fitted.coefficients)) == len(made.header.branches)
    for branch in constants:
        for number in range(4):
            for change in (-0.05, 0.05):
                branch[0][number] += change
                assert error() > least
                branch[0][number] -= change


def test_skipped_steps_among_corrected_ones_run_like_the_oracle(dit):
    """Modules are reused and forecast on the steps that the rule leaves."""
    scheduler = unclipped("ddim")
    plan = sg.forecast(skipping(dit, scheduler, "CCFCFC", ff="CCCRCR", attn="CCRRRC"), kinds=["attn"])
    made = sg.fit_whole_step(plan, dit, scheduler, samples=SAMPLES, seed=SEED)
    assert [row[-1] for row in made.rows] == list("CCFCFC")
    assert made.rows[3][:2] == "FR"
    exe = sg.compile(dit, made, inputs(2), backend="eager", exact=True)
    got = sg.sample(exe, scheduler, noise(2), **labels(1, 2))
    wanted, _ = run_loop(Oracle.of(dit, made), scheduler, noise(2), 6, 1.0, labels(1, 2))
    assert error(got, wanted) <= SAME_RUN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model, scheduler = tiny_dit().to(dtype), unclipped("dpm++")
    plan = skipping(model, scheduler, "CCFCFC")
    made = sg.fit_whole_step(plan, model, scheduler, samples=2, seed=SEED)
    wide = sg.fit_whole_step(skipping(tiny_dit(), scheduler, "CCFCFC"), tiny_dit(), scheduler, samples=2, seed=SEED)
    record, other = (p.header.arguments["corrections"][-1]["residuals"] for p in (made, wide))
    for step, residual in record.items():
        assert residual == pytest.approx(other[step], abs=0.1 if dtype == torch.bfloat16 else 1e-4)


# -- fits of single sites ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched():
    """A model, and the values of its sites in full runs, by site and step, [samples, ...]."""
    model = tiny_dit(num_layers=3)
    runs = watched_values(model, tiny_scheduler("ddim"), SAMPLES, steps=4, seed=SEED)
    return model, {name: [torch.cat([run[s][name] for run in runs]) for s in range(4)] for name in runs[0][0]}


OPTIONS = {"samples": SAMPLES, "seed": SEED, "conditioning": {"class_labels": torch.arange(SAMPLES)}}


@pytest.mark.parametrize("target", ["full", "own"])
@pytest.mark.parametrize("kind", ["ff", "stack_residual", "hidden", "output"])
def test_the_first_fit_is_numpys_on_the_full_runs_values(watched, kind, target):
    model, values = watched
    plan = sg.make_plan("manual", model=model, scheduler=tiny_scheduler("ddim"), steps=4, actions={kind: "CCRC"})
    made = sg.fit_forecast(plan, model, tiny_scheduler("ddim"), kinds=[kind], target=target, **OPTIONS)
    cells = {made.sites[i].name: forecast for (_, i), forecast in made.forecasts.items()}
    assert len(cells) == (3 if kind == "ff" else 1)
    for name, forecast in cells.items():
        first, second, third = (value[:, :4] if kind == "output" else value for value in values[name][:3])
        np.testing.assert_allclose(forecast.coefficients[0], solved([second, first], third), rtol=1e-4, atol=1e-5)


def test_the_next_fit_is_on_the_runs_own_states(watched):
    """Its second skipped step, from the states that an oracle reaches with the first one's coefficients."""
    model, _ = watched
    scheduler = tiny_scheduler("ddim")
    plan = sg.make_plan("manual", model=model, scheduler=scheduler, steps=4, actions={"ff": "CCRR", "attn": "CCRR"})
    made = sg.fit_forecast(plan, model, scheduler, target="own", **OPTIONS)
    oracle = Oracle.of(model, made)
    states = []

    def predict(**given):
        states.append(given["hidden_states"].clone())
        return oracle(**given)

    run_loop(predict, scheduler, calibration_noise(), 4, 1.0, OPTIONS["conditioning"])
    seen = {}
    paths = {f"transformer_blocks.{n}.{part}" for n in range(3) for part in ("attn1", "ff")}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: seen.update({path: out})) for path in paths
    ]
    times = made.header.timesteps
    with torch.no_grad():
        model(states[3], timestep=torch.full((SAMPLES,), int(times[3])), **OPTIONS["conditioning"])
    for hook in hooks:
        hook.remove()
    for path in paths:
        past = oracle.history[0][path][::-1]
        wanted = solved(past[:2], seen[path])
        np.testing.assert_allclose(made.forecasts[3, made.index(path)].coefficients[0], wanted, rtol=1e-3, atol=1e-4)


def test_residual_affine(watched):
    """Scale and shift of each channel as numpy fits a line; plan and factors belong together, and run like the oracle."""
    model, values = watched
    scheduler = tiny_scheduler("ddim")
    plan = sg.make_plan("manual", model=model, scheduler=scheduler, steps=4, actions={"stack_residual": "CCRR"})
    made, factors = sg.residual_affine(plan, model, scheduler, target="full", **OPTIONS)
    _, old, new, _ = (value.double().numpy().reshape(-1, 32) for value in values["stack_residual"])
    lines = np.stack([np.polyfit(old[:, c], new[:, c], 1) for c in range(32)], 1)
    np.testing.assert_allclose(factors.affine["stack_residual/2"].numpy(), lines, rtol=1e-3, atol=1e-5)
    assert made.header.factors == factors.digest
    made = sg.CachePlan.from_json(made.to_json())
    assert made.forecasts[3, made.index("stack_residual")].per_channel
    exe = sg.compile(model, made, inputs(2), backend="eager", exact=True, factors=factors)
    got = sg.sample(exe, scheduler, noise(2), **labels(1, 2))
    oracle = Oracle.of(model, made, tables=factors.affine)
    wanted, _ = run_loop(oracle, scheduler, noise(2), 4, 1.0, labels(1, 2))
    assert error(got, wanted) <= SAME_RUN


def test_least_squares_against_numpy():
    generator = torch.Generator().manual_seed(0)
    a, b, t = (torch.randn(5, 6, 3, generator=generator) for _ in range(3))
    found, residual = least_squares([a, b, None], t, 1e-12)
    matrix = np.stack([a.numpy().ravel(), b.numpy().ravel(), np.ones(90)], 1).astype(np.float64)
    wanted, left, *_ = np.linalg.lstsq(matrix, t.double().numpy().ravel(), rcond=None)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    assert residual == pytest.approx(float(left[0] ** 0.5 / t.double().norm()))
    own, _ = least_squares([a, None], t, 1e-12, per_channel=True)
    lines = [np.polyfit(a[..., c].numpy().ravel(), t[..., c].numpy().ravel(), 1) for c in range(3)]
    np.testing.assert_allclose(own.numpy(), np.stack(lines, 1), rtol=1e-4, atol=1e-6)
    # What is zero everywhere is not used, and a copy shares its coefficient.
    found, _ = least_squares([a, 0 * a, a], 4 * a, 1e-10)
    np.testing.assert_allclose(found.numpy(), [2, 0, 2], rtol=1e-6)
    assert least_squares([a], 0 * a, 1e-10)[1] == 0


# -- what it is good for, and what is refused --------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_a_trained_model_the_fitted_rule_beats_taylor():
    model, scheduler = load_model("glyph-dit"), load_scheduler("glyph-dit", "ddim")
    start = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    given = {"class_labels": torch.arange(2)}
    full = sg.sample(model, scheduler, start, steps=12, **given)

    def error(plan):
        exe = sg.compile(model, plan, sg.example_inputs(model, 2), backend="eager")
        return float(relative_errors(sg.sample(exe, scheduler, start, **given), full).mean())

    setting = {"model": model, "scheduler": scheduler, "steps": 12, "every": 3}
    fitted = sg.make_plan("whole-step", **setting, samples=2, seed=77)
    taylor = sg.forecast(sg.make_plan("interval", **setting))
    assert error(fitted) < 0.9 * error(taylor)
    assert fitted.header.policy == "whole-step"
    assert fitted.header.arguments["every"] == 3


def bad(change, **options):
    """A fit with something wrong: what `change` makes of (plan, model, scheduler)."""

    def run(dit):
        scheduler = unclipped("ddim")
        plan, model, scheduler = change(skipping(dit, scheduler, "CRCRCR"), dit, scheduler)
        sg.fit_whole_step(plan, model, scheduler, **({"samples": 1} | options))

    return run


BAD = {
    "stochastic": (
        bad(lambda p, m, s: (skipping(m, diffusers.DDPMScheduler(), "CRCRCR"), m, diffusers.DDPMScheduler())),
        "DDPMScheduler is stochastic",
    ),
    "scheduler": (bad(lambda p, m, s: (p, m, tiny_scheduler("dpm++"))), "compiled for DDIMScheduler, but the given scheduler"),
    "model": (bad(lambda p, m, s: (p, tiny_dit(seed=1), s)), "the plan is for other weights"),
    "clipped": (bad(lambda p, m, s: (skipping(m, SCHEDULERS["ddim"](), "CRCRCR"), m, SCHEDULERS["ddim"]())), "clipped"),
    "nothing": (
        bad(lambda p, m, s: (sg.make_plan("full", model=m, scheduler=s, steps=6), m, s)),
        r"the plan skips no step: .* make_plan\('interval', kinds=\['output'\]",
    ),
    "samples": (bad(lambda *a: a, samples=0), r"samples is 0; expected a whole number in 1\.\."),
    "target": (bad(lambda *a: a, target="truth"), "target is 'truth'; expected state, full or own"),
    "ridge": (bad(lambda *a: a, ridge=0), "ridge is 0; expected a number above 0 and below 1"),
    "terms": (bad(lambda *a: a, terms=["y2", "x0"]), "step 1, site output: 1 values are stored, too few for the terms"),
    "unknown": (bad(lambda *a: a, terms=["z1"]), "a term is 'y1'..'y9'"),
    "guidance": (
        bad(lambda p, m, s: (skipping(m, s, "CRCRCR", "separate"), m, s)), "one branch each for cond and uncond; pass a guid"
    ),
    "no guidance": (
        bad(lambda p, m, s: (skipping(m, s, "CRCRCR", "none"), m, s), guidance_scale=2.0), "sampling without guidance"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_fitted_is_refused(dit, case):
    run, message = BAD[case]
    with pytest.raises(PlanError, match=message):
        run(dit)


def test_terms_and_targets_belong_to_kinds(dit, ddim):
    plan = sg.make_plan("manual", model=dit, scheduler=ddim, steps=4, actions={"ff": "CRCR"})
    with pytest.raises(PlanError, match="only a forecast of `output` takes the model's input"):
        sg.fit_forecast(plan, dit, ddim, terms=["y1", "x0"], samples=1)
    with pytest.raises(PlanError, match="the target 'state' is for forecasts of `output`; expected 'full' or 'own'"):
        sg.fit_forecast(plan, dit, ddim, target="state", samples=1)
    with pytest.raises(PlanError, match="nothing to fit: the chosen sites are nowhere reused or forecast"):
        sg.residual_affine(plan, dit, ddim, samples=1)
    separate = sg.make_plan("manual", model=dit, scheduler=ddim, steps=4, actions={"ff": "CRCR"}, guidance="separate")
    with pytest.raises(PlanError, match="serve all branches of a plan"):
        sg.residual_affine(separate, dit, ddim, samples=1)
    with pytest.raises(PlanError, match="every is 1; expected a whole number of at least 2"):
        sg.make_plan("whole-step", model=dit, scheduler=ddim, steps=4, every=1)


def test_the_command_line_corrects_plans(tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "corrected.json"
    invoke("plan", "make", "--policy", "interval", "--steps", 4, "-a", "every=2", "-o", plan)
    facts = json.loads(invoke("plan", "correct", plan, "--forecast", "taylor", "--kind", "ff", "-o", out, "--json"))
    assert facts["kinds"]["ff"]["corrected"] == 20
    assert facts["kinds"]["attn"]["reused"] == 20
    made = sg.CachePlan.load(out)
    assert made.header.arguments["corrections"][-1]["kinds"] == ["ff"]
    invoke("plan", "make", "--policy", "interval", "--steps", 4, "-a", 'kinds=["output"]', "-o", plan)
    text = invoke("plan", "correct", plan, "glyph-dit", "--fit", "whole-step", "--samples", 1, "-o", out)
    assert "fit_whole_step" in text
    assert sg.CachePlan.load(out).forecasts[3, sg.CachePlan.load(out).index("output")].terms == ("y1", "y2", "x0", "x1")


def test_the_command_line_keeps_factors_beside_the_plan(tmp_path):
    plan, out, again = tmp_path / "plan.json", tmp_path / "affine.json", tmp_path / "again.json"
    small = save_small_glyph_dit(tmp_path / "model")
    arguments = ("-a", "every=2", "-a", 'kinds=["stack_residual"]')
    invoke("plan", "make", "--model", small, "--policy", "interval", "--steps", 4, *arguments, "-o", plan)
    text = invoke("plan", "correct", plan, small, "--fit", "residual-affine", "--samples", 1, "-o", out)
    assert "residual_affine" in text
    factors = sg.Factors.load(tmp_path / "affine.factors.safetensors")
    assert sorted(factors.affine) == ["stack_residual/1", "stack_residual/3"]
    assert sg.CachePlan.load(out).header.factors == factors.digest
    beside = tmp_path / "affine.factors.safetensors"
    invoke("plan", "correct", plan, "--forecast", "taylor", "--factors", beside, "-o", again)
    assert sg.Factors.load(tmp_path / "again.factors.safetensors").digest == factors.digest
    assert "y1 and a constant" in error_of("plan", "correct", plan, small, "--fit", "residual-affine", "--term", "x0")


def test_the_command_line_says_what_is_wrong(tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "corrected.json"
    small = save_small_glyph_dit(tmp_path / "model")
    invoke("plan", "make", "--model", small, "--policy", "interval", "--steps", 4, "-o", plan)
    correct = ("plan", "correct", plan, "-o", out)
    assert error_of(*correct) == "give one of --forecast, --fit and --lowrank; got none"
    assert "got --forecast and --lowrank" in error_of(*correct, "--forecast", "taylor", "--lowrank")
    assert (
        error_of(*correct, "--forecast", "taylor", "--around", "taylor") == "--around goes with --lowrank, not with --forecast"
    )
    increments = (*correct, "--lowrank")
    assert error_of(*increments, "--order", 7) == "--order goes with --forecast or --around, not with --lowrank"
    assert "the order is 7; expected a whole number in 0..4" in error_of(*increments, "--around", "taylor", "--order", 7)
    assert "--order goes with" in error_of(*correct, "glyph-dit", "--fit", "whole-step", "--order", 2)
    for option in ("--samples", "--seed", "--guidance", "--scheduler", "--dtype"):
        stray = (option, "ddim" if option == "--scheduler" else "float32" if option == "--dtype" else 3)
        for asked in (("--forecast", "taylor"), ("--lowrank",)):
            assert error_of(*correct, *asked, *stray) == f"{option} goes with --fit, not with {asked[0]}"
    assert error_of("plan", "correct", plan, "glyph-dit", "--lowrank") == "MODEL goes with --fit, not with --lowrank"
    assert "--fit runs the model: name it" in error_of(*correct, "--fit", "sites")
    assert "unknown fit 'all'; known: whole-step, sites" in error_of(*correct, "glyph-dit", "--fit", "all")
    assert "--kind and --site go with --fit sites" in error_of(*correct, "glyph-dit", "--fit", "whole-step", "--kind", "ff")
    assert "the plan skips no step" in error_of(*correct, small, "--fit", "whole-step")
    assert not out.exists()
