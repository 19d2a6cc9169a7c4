"""The fused update: what schedulers' own steps give, in one linear combination; and the schedulers that it declines."""

import inspect
from math import exp, log, sqrt

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.oracle import run_loop
from helpers.tiny import NULL_CLASS, inputs, labels, noise
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.errors import PlanError
from stepgraph.runtime.sampling.linear_steps import Term, linear_steps
from stepgraph.runtime.sampling.update import FusedUpdate, SchedulerUpdate, choose_update
from stepgraph.scheduler import prepare_scheduler, step_arguments
from stepgraph.tolerances import OP, tolerance

STEPS = 20
NULL = {"negative_class_labels": torch.tensor([NULL_CLASS, NULL_CLASS])}
DDIM, EULER, DPM = diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def unclipped(**settings) -> diffusers.DDIMScheduler:
    return DDIM(clip_sample=False, **settings)


# Scheduler, most values that a step combines, and how many steps back it looks.
LINEAR = {
    **{f"ddim {kind}": (lambda kind=kind: unclipped(prediction_type=kind), 2, 0) for kind in PREDICTIONS},
    "ddim trailing": (lambda: unclipped(timestep_spacing="trailing", prediction_type="v_prediction"), 2, 0),
    "ddim inverse": (lambda: diffusers.DDIMInverseScheduler(clip_sample=False), 2, 0),
    **{f"euler {kind}": (lambda kind=kind: EULER(prediction_type=kind), 2, 0) for kind in PREDICTIONS[:2]},
    "euler karras": (lambda: EULER(use_karras_sigmas=True), 2, 0),
    "edm": (lambda: diffusers.EDMEulerScheduler(), 2, 0),
    "flow": (FLOW, 2, 0),
    "flow shifted": (lambda: FLOW(shift=3.0), 2, 0),
    **{f"dpm++ {kind}": (lambda kind=kind: DPM(prediction_type=kind), 4, 1) for kind in PREDICTIONS[:2]},
    "dpm++ sample": (lambda: DPM(prediction_type="sample"), 3, 1),
    "dpm++ 1": (lambda: DPM(solver_order=1), 2, 0),
    "dpm++ 3": (lambda: DPM(solver_order=3), 6, 2),
    "dpm++ heun karras": (lambda: DPM(solver_type="heun", use_karras_sigmas=True), 4, 1),
    "dpm++ euler at final": (lambda: DPM(euler_at_final=True), 4, 1),
    "dpm++ all second order": (lambda: DPM(lower_order_final=False), 4, 1),
    "dpm++ flow": (lambda: DPM(prediction_type="flow_prediction", use_flow_sigmas=True), 4, 1),
    "deis": (lambda: diffusers.DEISMultistepScheduler(), 3, 1),
    "heun": (lambda: diffusers.HeunDiscreteScheduler(), 3, 1),
    "flow heun": (lambda: diffusers.FlowMatchHeunDiscreteScheduler(), 3, 1),
    "plms": (lambda: diffusers.PNDMScheduler(skip_prk_steps=True), 5, 4),
}  # fmt: skip


def outputs_for(steps: int, shape, count: int = 1, dtype=torch.float32) -> list[tuple[torch.Tensor, ...]]:
    """Random model outputs of every step, from one seed: what the updates get does not depend on what they gave."""
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(count)) for _ in range(steps)]


def run(update, scheduler, latents: torch.Tensor, outputs) -> list[torch.Tensor]:
    """The latents after every step."""
    seen = []
    for t, given in zip(scheduler.timesteps, outputs, strict=True):
        update.scaled(latents, t)
        latents = update(latents, given, t)
        seen.append(latents)
    return seen


def both_ways(make, outputs, guidance_scale=None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The latents after every step by the fused update and by the scheduler's own step, from the same outputs."""
    own = prepare_scheduler(make(), STEPS)
    found = linear_steps(own, step_arguments(own))
    assert not isinstance(found, str), found
    first = outputs[0][0]
    start = torch.randn(first.shape, generator=torch.Generator().manual_seed(2)) * getattr(own, "init_noise_sigma", 1)
    start = start.to(first.dtype)
    got = run(FusedUpdate(found, start, guidance_scale), own, start, outputs)
    return got, run(SchedulerUpdate(own, step_arguments(own), guidance_scale or 1.0), own, start, outputs)


def far(got, wanted) -> float:
    """Relative L2, of lists the largest."""
    if isinstance(got, list):
        return max(map(far, got, wanted))
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def doubled(outputs):
    return [tuple(value.double() for value in given) for given in outputs]


@pytest.mark.parametrize("guidance_scale", [None, 4.0])
@pytest.mark.parametrize("name", LINEAR)
def test_fused_updates_are_the_schedulers_steps(name, guidance_scale):
    make, values, age = LINEAR[name]
    own = prepare_scheduler(make(), STEPS)
    found = linear_steps(own, step_arguments(own))
    assert max(len(terms) for terms in found.terms) == values
    assert max(term.age for terms in found.terms for term in terms) == age
    outputs = outputs_for(len(own.timesteps), (2, 4, 6, 5), 1 if guidance_scale is None else 2)
    got, wanted = both_ways(make, outputs, guidance_scale)
    assert far(got, wanted) <= 1e-6
    assert far(got, both_ways(make, doubled(outputs), guidance_scale)[1]) <= 1e-6
    assert (got[-1].shape, got[-1].dtype) == (wanted[-1].shape, wanted[-1].dtype)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_float64_latents_are_updated_in_float64(kind):
    """DDIM computes in its inputs' dtype, so that its own steps are a float64 reference."""
    outputs = outputs_for(STEPS, (2, 4, 6, 5), 2, torch.float64)
    got, wanted = both_ways(lambda: unclipped(prediction_type=kind), outputs, 4.0)
    assert got[0].dtype == torch.float64
    assert far(got, wanted) <= 1e-12


def ddim_by_hand(alphas, steps, outputs, x):
    for i, epsilon in enumerate(outputs):
        t = (steps - 1 - i) * (1000 // steps)
        now, then = alphas[t], alphas[t - 1000 // steps] if i + 1 < steps else 1.0
        x = sqrt(then) * (x - sqrt(1 - now) * epsilon) / sqrt(now) + sqrt(1 - then) * epsilon
    return x


def dpm_by_hand(alphas, steps, outputs, x):
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), the first and the last step of order 1, to sigma 0."""
    times = [round(i * 999 / steps) for i in range(steps, 0, -1)]
    a, s = [sqrt(alphas[t]) for t in times] + [1.0], [sqrt(1 - alphas[t]) for t in times] + [0.0]
    logs, before = [log(p / q) if q else float("inf") for p, q in zip(a, s, strict=True)], None
    for i, epsilon in enumerate(outputs):
        data, h = (x - s[i] * epsilon) / a[i], logs[i + 1] - logs[i]
        target = data
        if before is not None and i + 1 < steps:
            target = data + (data - before) * h / (2 * (logs[i] - logs[i - 1]))
        x, before = s[i + 1] / s[i] * x - a[i + 1] * (exp(-h) - 1) * target, data
    return x


@pytest.mark.parametrize(("make", "by_hand"), [(unclipped, ddim_by_hand), (DPM, dpm_by_hand)])
def test_fused_updates_are_the_published_formulas(make, by_hand):
    """In float64 from the scheduler's alphas, which its own coefficients have lost digits of: hence 1e-5."""
    own = prepare_scheduler(make(), STEPS)
    outputs = outputs_for(STEPS, (1, 4, 6, 5), 1, torch.float64)
    start = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    update = FusedUpdate(linear_steps(own, step_arguments(own)), start, None)
    wanted = by_hand(own.alphas_cumprod.double().tolist(), STEPS, [given[0] for given in outputs], start)
    assert far(run(update, own, start, outputs)[-1], wanted) <= 1e-5


def test_flow_matching_goes_straight_on():
    own = prepare_scheduler(FLOW(), 4)
    found = linear_steps(own, {})
    assert found.scales == (1, 1, 1, 1)
    for i, terms in enumerate(found.terms):
        assert terms == (Term(0, False, 1.0), Term(0, True, float(own.sigmas[i + 1] - own.sigmas[i])))


def test_eulers_input_scaling_is_kept():
    own = prepare_scheduler(EULER(), 4)
    found = linear_steps(own, {})
    wanted = [1 / sqrt(float(sigma) ** 2 + 1) for sigma in own.sigmas[:-1]]
    assert found.scales == pytest.approx(wanted, rel=1e-6)
    latents = noise(2)
    assert torch.equal(FusedUpdate(found, latents, None).scaled(latents, own.timesteps[0]), latents * found.scales[0])


def test_steps_are_probed_anew_where_a_table_was_changed():
    scheduler = FLOW()
    before = linear_steps(prepare_scheduler(scheduler, 4), {})
    assert linear_steps(prepare_scheduler(FLOW(), 4), {}) is before
    scheduler.set_shift(3.0)
    assert linear_steps(prepare_scheduler(scheduler, 4), {}) != before
    own = prepare_scheduler(unclipped(), 4)
    before = linear_steps(own, {"eta": 0.0})
    own.alphas_cumprod = own.alphas_cumprod * 0.9
    assert linear_steps(own, {"eta": 0.0}) != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precisions_accumulate_in_float32(dtype):
    """One rounding a step, of the result: nearer to float64 than the scheduler's own step, which rounds in between."""
    outputs = outputs_for(STEPS, (2, 4, 6, 5), 2, dtype)
    (*_, got), (*_, rounded) = both_ways(unclipped, outputs, 4.0)
    *_, exact = both_ways(unclipped, doubled(outputs), 4.0)[1]
    assert got.dtype == dtype
    assert far(got, exact) <= tolerance(OP, dtype)
    assert far(got, exact) < far(rounded, exact)


@pytest.mark.parametrize("provider", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 5), (2, 4, 6, 5), (1, 4, 2, 3, 5)])
def test_halves_of_batches_and_channels_are_taken_as_views(monkeypatch, provider, shape):
    """As they come from a model with a learned variance under guidance: not contiguous, and here with transposed rows too."""
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", f"{provider},reference")
    generator, views = torch.Generator().manual_seed(3), []
    for number in range(STEPS):
        whole = torch.randn(2 * shape[0], 2 * shape[1], *shape[2:], generator=generator)
        if number % 2:
            whole = whole.transpose(-1, -2).contiguous().transpose(-1, -2)
        views.append(tuple(half.chunk(2, dim=1)[0] for half in whole.chunk(2)))
    got, wanted = both_ways(DPM, views, 2.0)
    assert far(got, wanted) <= 1e-6


DECLINED = {
    "clipping": (DDIM, {}, "DDIMScheduler is no fixed linear combination.*clip_sample=True"),
    "wide clipping": (lambda: DDIM(clip_sample_range=50.0), {}, "no fixed linear combination.*clip_sample=True"),
    "thresholding": (lambda: unclipped(thresholding=True), {}, "no fixed linear combination.*thresholding=True"),
    "dpm++ thresholding": (lambda: DPM(thresholding=True), {}, "no fixed linear combination.*thresholding=True"),
    "eta": (unclipped, {"eta": 0.5}, "no fixed linear combination.*eta=0.5"),
    "ddpm": (lambda: diffusers.DDPMScheduler(clip_sample=False), {}, "DDPMScheduler is no fixed linear.*draws random numbers"),
    "ancestral": (lambda: diffusers.EulerAncestralDiscreteScheduler(), {}, "no fixed linear combination.*draws random numbers"),
    "sde": (lambda: DPM(algorithm_type="sde-dpmsolver++"), {}, "no fixed linear combination.*draws random numbers"),
    "stochastic flow": (lambda: FLOW(stochastic_sampling=True), {}, "no fixed linear combination.*draws random numbers"),
    "third order": (lambda: DPM(solver_order=3), {}, "a step combines 9 values; one pass takes 8"),
    "all of the past": (lambda: diffusers.UniPCMultistepScheduler(), {}, "a step combines .* values; one pass takes 8"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_schedulers_without_fixed_combinations_are_declined(dit, case):
    make, arguments, message = DECLINED[case]
    own = prepare_scheduler(make(), STEPS)
    state = torch.get_rng_state()
    update, reason = choose_update(own, step_arguments(own) | arguments, noise(2), 4.0, fused=True)
    assert isinstance(update, SchedulerUpdate)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(PlanError, match=f"fused_update=True, but .*{message}"):
        sg.sample(dit, make(), noise(2), 4.0, steps=STEPS, fused_update=True, **arguments, **labels(1, 2), **NULL)
    assert choose_update(own, step_arguments(own), noise(2), 4.0, fused=False)[1] == ""
    assert reason


@pytest.fixture
def count_steps(monkeypatch):
    """How often the loop takes the scheduler's own step; the probe's are not counted, as they are in float64."""
    seen = []
    for kind in (DDIM, DPM, EULER):
        original = kind.step

        def counted(self, output, *args, _original=original, **kwargs):
            seen.extend([self] if output.dtype != torch.float64 else [])
            return _original(self, output, *args, **kwargs)

        counted.__signature__ = inspect.signature(original)
        monkeypatch.setattr(kind, "step", counted)
    return seen


def compiled(dit, scheduler, guidance, exact):
    plan = sg.make_plan("full", model=dit, scheduler=scheduler, steps=5, guidance=guidance)
    return sg.compile(dit, plan, inputs(4 if guidance == "batched" else 2), backend="eager", exact=exact)


@pytest.mark.parametrize(("guidance", "scale"), [("none", 1.0), ("batched", 3.0), ("separate", 3.0)])
@pytest.mark.parametrize("make", [unclipped, DPM, EULER])
def test_executables_fuse_unless_they_are_exact(dit, count_steps, make, guidance, scale):
    scheduler, given = make(), labels(1, 2) | (NULL if scale > 1 else {})
    exe = compiled(dit, scheduler, guidance, exact=False)
    count_steps.clear()
    fused = sg.sample(exe, scheduler, noise(2), scale, **given)
    assert len(count_steps) == 0
    own = sg.sample(exe, scheduler, noise(2), scale, fused_update=False, **given)
    assert len(count_steps) == 5
    assert 0 < far(fused, own) <= 1e-6
    exact = compiled(dit, scheduler, guidance, exact=True)
    count_steps.clear()
    got = sg.sample(exact, scheduler, noise(2), scale, **given)
    assert len(count_steps) == 5
    null = {"class_labels": NULL["negative_class_labels"]}
    assert torch.equal(got, run_loop(dit, scheduler, noise(2), 5, scale, labels(1, 2), null, guidance == "separate")[0])
    fused_model = sg.sample(dit, scheduler, noise(2), scale, steps=5, fused_update=True, **given)
    fused_exact = sg.sample(exact, scheduler, noise(2), scale, fused_update=True, **given)
    assert far(fused_model, fused_exact) <= 1e-6


def test_executables_take_the_own_step_of_schedulers_that_clip(dit, ddim, count_steps):
    exe = compiled(dit, ddim, "none", exact=False)
    count_steps.clear()
    default = sg.sample(exe, ddim, noise(2), **labels(1, 2))
    assert len(count_steps) == 5
    assert torch.equal(default, sg.sample(exe, ddim, noise(2), fused_update=False, **labels(1, 2)))


def test_noise_of_the_scheduler_is_the_callers(dit, ddim):
    """Probing must not draw from the generator that the run's noise comes from."""
    exe = compiled(dit, ddim, "none", exact=False)
    results = []
    for fused in (None, False):
        torch.manual_seed(5)
        results.append(sg.sample(exe, ddim, noise(2), eta=0.5, fused_update=fused, **labels(1, 2)))
    assert torch.equal(*results)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_every_step_sees_the_same_conditioning(dit, scale):
    seen = []
    handle = dit.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True)
    try:
        sg.sample(dit, unclipped(), noise(2), scale, steps=3, **labels(1, 2), **(NULL if scale > 1 else {}))
    finally:
        handle.remove()
    assert len(seen) == 3
    assert all(tensor is seen[0] for tensor in seen)
    assert seen[0].tolist() == [1, 2] + ([NULL_CLASS, NULL_CLASS] if scale > 1 else [])


@pytest.mark.parametrize("kind", ["ddim", "dpm++", "euler", "flow-euler"])
def test_glyphs_come_out_the_same(kind):
    """Against schedulers' own steps in float64: Euler's own in float32 comes no nearer than 4e-5, for its large latents."""
    model, scheduler = load_model("glyph-dit"), load_scheduler("glyph-dit", kind)
    start = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    given = {"class_labels": torch.tensor([3, 7]), "negative_class_labels": torch.tensor([10, 10])}
    fused = sg.sample(model, scheduler, start, 2.0, steps=STEPS, fused_update=True, **given)
    exact = sg.sample(model.double(), scheduler, start.double(), 2.0, steps=STEPS, **given)
    assert 0 < far(fused, exact) <= 1e-6
