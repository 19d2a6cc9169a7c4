"""A policy's knob swept: what each value costs in MACs and in error, measured by running the plans."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stepgraph.checked import checked
from stepgraph.checks import check_whole
from stepgraph.compiler.calibration.calibrate import conditioning_of
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.entry.make_plan import plan_traced
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.planning.sweep_result import FewerSteps, Sweep, SweepPoint
from stepgraph.config import CompileConfig
from stepgraph.errors import ArgumentError
from stepgraph.fingerprint import model_dtype
from stepgraph.inputs import latents_of
from stepgraph.metrics import relative_errors
from stepgraph.plan import CachePlan, PlanHeader
from stepgraph.runtime.sampling.sample import sample
from stepgraph.schedule import Schedule
from stepgraph.scheduler import prepare_scheduler
from stepgraph.wrapped_models import unwrapped


@checked
def sweep(
    policy: str,
    stats: CalibrationStats | None = None,
    *,
    model: nn.Module,
    scheduler: Any,
    knob: str | Sequence[str],
    values: Sequence[Any],
    steps: int | None = None,
    samples: int = 16,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch: int = 32,
    arguments: Mapping[str, Any] | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
    conditioning: Mapping[str, Any] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
) -> Sweep:
    """Make a plan for every value of a knob, sample with each from the same noise, and compare with full compute.

    The same sampler in fewer steps is measured beside it, at the two whole numbers of steps around the MACs of every plan.

    Args:
        policy: Name of a policy.
        stats: Calibration, where the policy needs it; it brings the number of steps.
        model: The model, on any device.
        scheduler: A deterministic diffusers scheduler; it is copied and not changed.
        knob: The argument that takes the values; several take the same value together.
        values: What to try, at least one; repeated values are tried once.
        steps: Number of inference steps.
        samples: Samples behind every error.
        guidance_scale: Classifier-free guidance in one batch; 1 for none.
        seed: Of the noise.
        batch: Most samples that are run at once.
        arguments: The policy's other arguments.
        on_step: Called with (what is running, steps done, steps in all).
        conditioning: As for `stepgraph.calibrate`; the example conditioning of the model's family unless given (classes in turn
            for DiT).
        schedule: As for `stepgraph.calibrate`; statistics bring theirs. Fewer steps are spaced as it spaces them.

    Raises:
        PlanError: Nothing to sweep, a knob that is an argument too, or what `make_plan` refuses.
        CompileError: No conditioning is given, and the model's family has no example of it (FLUX).
    """
    model = unwrapped(model)
    knobs = (knob,) if isinstance(knob, str) else tuple(knob)
    fixed = dict(arguments or {})
    values = [value for i, value in enumerate(values) if value not in values[:i]]
    _refuse_nothing_to_sweep(knobs, values, fixed, {"samples": samples, "batch": batch})
    traced = TracedModel(model)
    # A model that cannot be sampled by name is refused before any work.
    runs = _Runs(traced, scheduler, samples, guidance_scale, seed, batch, conditioning)
    guidance = "batched" if guidance_scale > 1 else "none"
    steps = stats.header.steps if steps is None and stats else steps
    plans = [
        plan_traced(
            policy, stats, traced, scheduler, {**fixed, **dict.fromkeys(knobs, value)}, steps=steps, guidance=guidance,
            conditioning=conditioning, schedule=schedule,
        )
        for value in values
    ]  # fmt: skip
    runs.schedule = plans[0].header.schedule
    if runs.schedule.begin:
        raise ArgumentError(
            "a sweep starts from noise, at the schedule's beginning; leave strength and begin out of the schedule"
        )
    shorter = _neighbours(plans, scheduler)
    # Values that make the same plan are run once, under the first one's name.
    distinct = sorted({plan.rows: i for i, plan in reversed(list(enumerate(plans)))}.values())
    header = plans[0].header
    runs.begin(header.steps, header.steps * (1 + len(distinct)) + sum(shorter), on_step)
    branches = 2 if guidance == "batched" else 1
    baseline = tuple(
        FewerSteps(
            branches * header.macs * _evaluations(header, scheduler, count),
            *runs.error(f"fewer steps: {count}", model, count),
            count,
        )
        for count in shorter
    )
    errors = {}
    for i in distinct:
        inputs = traced.example_inputs(runs.rows, conditioning)
        executable = compile_plan(model, plans[i], inputs, CompileConfig("eager"), traced=traced)
        errors[plans[i].rows] = runs.error(f"{', '.join(knobs)} = {values[i]}", executable, header.steps)
    points = tuple(
        SweepPoint(branches * plan.summary().macs, *errors[plan.rows], value, plan)
        for value, plan in zip(values, plans, strict=True)
    )
    return Sweep(
        policy, knobs, header.model, header.scheduler, header.steps, samples, guidance_scale, seed,
        branches * header.macs * plans[0].steps, points, baseline,
    )  # fmt: skip


def _refuse_nothing_to_sweep(
    knobs: Sequence[str], values: Sequence[Any], fixed: Mapping[str, Any], sizes: Mapping[str, int]
) -> None:
    if not knobs or not values:
        raise ArgumentError(f"nothing to sweep: {len(knobs)} knobs and {len(values)} values; expected at least one of each")
    twice = sorted(set(knobs) & set(fixed))
    if twice:
        raise ArgumentError(f"{twice[0]!r} is swept and given as {fixed[twice[0]]!r} as well; leave one of them out")
    for name, size in sizes.items():
        check_whole(name, size, 1)


def _neighbours(plans: Sequence[CachePlan], scheduler: Any) -> list[int]:
    """The numbers of steps, most first, whose MACs lie just below and just above those of the plans."""
    steps = plans[0].header.steps
    evaluations = {n: _evaluations(plans[0].header, scheduler, n) for n in range(1, steps)}
    counts = set()
    for plan in plans:
        summary = plan.summary()
        if summary.macs == summary.macs_total:
            continue
        target = plan.steps * summary.macs / summary.macs_total if summary.macs_total else 0.0
        counts |= set([n for n, count in evaluations.items() if count <= target][-1:])
        counts |= set([n for n, count in evaluations.items() if count >= target][:1])
    return sorted(counts, reverse=True)


def _evaluations(header: PlanHeader, scheduler: Any, steps: int) -> int:
    """How often the model is evaluated in a smaller number of steps."""
    return len(prepare_scheduler(scheduler, steps, schedule=header.schedule.shorter(steps)).timesteps)


class _Runs:
    """Sampling from one fixed noise and conditioning, compared with full compute; `rows` of the model's input at once."""

    schedule = Schedule()

    def __init__(
        self,
        traced: TracedModel,
        scheduler: Any,
        samples: int,
        guidance_scale: float,
        seed: int,
        batch: int,
        conditioning: Mapping[str, Any] | None,
    ) -> None:
        model = traced.model
        latents = latents_of(traced.example_inputs(1, conditioning))
        noise = torch.randn(samples, *latents.shape[1:], generator=torch.Generator().manual_seed(seed))
        chosen = conditioning_of(traced, conditioning, samples, guidance_scale > 1, latents.device)
        if guidance_scale <= 1:
            chosen = {name: value for name, value in chosen.items() if not name.startswith("negative_")}
        unbatched = traced.family.unbatched
        self.noise = noise.to(latents.device, model_dtype(model)).split(batch)
        self.conditioning = {
            name: [value] * len(self.noise) if name.removeprefix("negative_") in unbatched else value.split(batch)
            for name, value in chosen.items()
        }
        self.model, self.scheduler, self.guidance_scale = model, scheduler, guidance_scale
        self.rows = len(self.noise[0]) * (2 if guidance_scale > 1 else 1)

    def begin(self, steps: int, total: int, on_step: Callable[[str, int, int], None] | None) -> None:
        """Run full compute in `steps` steps; `total` steps follow in all, this run's included."""
        self.done, self.total, self.on_step = 0, total, on_step
        self.reference = self._sample("full compute", self.model, steps)

    def error(self, name: str, runner: Any, steps: int) -> tuple[float, float]:
        """Mean relative L2 over the samples, and its standard error."""
        errors = relative_errors(self._sample(name, runner, steps), self.reference)
        spread = float(errors.std() / len(errors) ** 0.5) if len(errors) > 1 else 0.0
        return float(errors.mean()), spread

    def _sample(self, name: str, runner: Any, steps: int) -> torch.Tensor:
        """Run all samples, and count their steps as done; final latents [samples, ...] on the CPU."""
        results = []
        for index, noise in enumerate(self.noise):
            chosen: dict[str, Any] = {key: parts[index] for key, parts in self.conditioning.items()}

            def advance(step: int, all_steps: int, part: int = index) -> None:
                share = (part + step / all_steps) / len(self.noise)
                if self.on_step is not None:
                    self.on_step(name, self.done + round(share * steps), self.total)

            schedule = self.schedule.shorter(steps)
            final = sample(
                runner, self.scheduler, noise, self.guidance_scale, steps=steps, schedule=schedule, on_step=advance, **chosen
            )
            results.append(final.cpu())
        self.done += steps
        return torch.cat(results)
