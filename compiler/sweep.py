"""A policy's knob swept: what each value costs in MACs and in error, measured by running the plans."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stepgraph.compiler.describe import example_inputs
from stepgraph.compiler.make_plan import make_plan
from stepgraph.compiler.models import family_of
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.stats import CalibrationStats
from stepgraph.config import CompileConfig
from stepgraph.fingerprint import config_of, model_dtype
from stepgraph.metrics import relative_errors
from stepgraph.plan import CachePlan, PlanError
from stepgraph.runtime.sampler import prepare_scheduler, sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Measured:
    """What one way of sampling costs.

    Attributes:
        macs: Multiply-accumulates per image over the whole run, both halves of the guidance included.
        error: Mean over the samples of the relative L2 of the final latents against full compute of the same sampler.
        standard_error: Of that mean.
    """

    macs: int
    error: float
    standard_error: float


@dataclass(frozen=True)
class SweepPoint(Measured):
    """One value of the knob, and the plan it makes."""

    value: Any
    plan: CachePlan


@dataclass(frozen=True)
class FewerSteps(Measured):
    """The same sampler at full compute in fewer steps: what a cache has to beat."""

    steps: int


@dataclass(frozen=True)
class Sweep:
    """A swept knob (`stepgraph.sweep`).

    Attributes:
        policy: The policy.
        knobs: The arguments that took the values.
        model: Class name of the model.
        scheduler: Class name of the scheduler.
        steps: Number of inference steps.
        samples: Samples behind every error.
        guidance_scale: Classifier-free guidance; 1 for none.
        seed: Of the noise.
        macs_full: Multiply-accumulates per image of full compute.
        points: In the order of the values.
        baseline: Fewer steps at about the MACs of the points, most steps first.
    """

    policy: str
    knobs: tuple[str, ...]
    model: str
    scheduler: str
    steps: int
    samples: int
    guidance_scale: float
    seed: int
    macs_full: int
    points: tuple[SweepPoint, ...]
    baseline: tuple[FewerSteps, ...]

    @property
    def front(self) -> list[SweepPoint]:
        """The points that no other one equals or beats in MACs and in error, fewest MACs first."""
        return [self.points[i] for i in pareto_front([(point.macs, point.error) for point in self.points])]

    @property
    def knee(self) -> SweepPoint | None:
        """Where saving more MACs begins to cost more than it did (`find_knee`), if there is such a point."""
        index = find_knee([(point.macs, point.error) for point in self.points])
        return None if index is None else self.points[index]

    def fewer_steps_error(self, macs: float) -> float | None:
        """The error of fewer steps at these MACs, linear between whole numbers of steps; None below the fewest measured."""
        known = sorted([(float(b.macs), b.error) for b in self.baseline] + [(float(self.macs_full), 0.0)])
        for (low, high_error), (high, low_error) in zip(known, known[1:], strict=False):
            if low <= macs <= high:
                return high_error + (low_error - high_error) * (macs - low) / (high - low)
        return known[0][1] if macs == known[0][0] else None

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Error against MACs with the knee and the baseline; written to `path` where given."""
        from stepgraph.compiler.sweep_plot import plot_sweep

        return plot_sweep(self, path)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the plans."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("points", "baseline")}
        knee = self.knee
        points = [
            {
                "value": point.value,
                "macs": point.macs,
                "fewer_macs": self.macs_full / point.macs if point.macs else None,
                "error": point.error,
                "standard_error": point.standard_error,
                "fewer_steps_error": self.fewer_steps_error(point.macs),
            }
            for point in self.points
        ]
        return facts | {
            "points": points,
            "baseline": [asdict(point) for point in self.baseline],
            "knee": None if knee is None else knee.value,
        }


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (MACs, error) that no other point equals or beats in both, fewest MACs first; of equal ones the first.

    Points without error, whose logarithm has no place on the axis, and those that are not finite are left out.
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if 0 < points[i][1] < math.inf and (not found or points[i][1] < points[found[-1]][1]):
            found.append(i)
    return found


def find_knee(points: Sequence[tuple[float, float]]) -> int | None:
    """Index of the knee among (MACs, error): the point of the front that lies farthest below its chord.

    MACs and log error are scaled to 0..1 over the front; the chord joins the front's two ends. There is no knee where the front
    has fewer than three points, or none of them lies below the chord by more than rounding.
    """
    front = pareto_front(points)
    if len(front) < 3:
        return None
    (left, highest), (right, lowest) = points[front[0]], points[front[-1]]

    def depth(i: int) -> float:
        # In the scaled plane the chord is x + y = 1, and the distance from it (1 - x - y) / sqrt(2).
        x = (points[i][0] - left) / (right - left)
        return 1 - x - math.log(points[i][1] / lowest) / math.log(highest / lowest)

    deepest = max(front, key=depth)
    return deepest if depth(deepest) > 1e-9 else None


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
) -> Sweep:
    """Make a plan for every value of a knob, sample with each from the same noise, and compare with full compute.

    The same sampler in fewer steps is measured beside it, at the two whole numbers of steps around the MACs of every plan.

    Args:
        policy: Name of a policy.
        stats: Calibration, where the policy needs it; it brings the number of steps.
        model: The model, on any device; the example conditioning of its family is used (classes in turn for DiT).
        scheduler: A deterministic diffusers scheduler; it is copied and not changed.
        knob: The argument that takes the values; several take the same value together.
        values: What to try, at least one; repeated values are tried once.
        steps: Number of inference steps.
        samples: Samples behind every error.
        guidance_scale: Classifier-free guidance in one batch; 1 for none.
        seed: Of the noise.
        batch: Most samples that are run at once.
        arguments: The policy's other arguments.
        on_step: Called with (what is running, evaluations done, evaluations in all).

    Raises:
        PlanError: Nothing to sweep, a knob that is an argument too, or what `make_plan` refuses.
    """
    knobs = (knob,) if isinstance(knob, str) else tuple(knob)
    fixed = dict(arguments or {})
    values = [value for i, value in enumerate(values) if value not in values[:i]]
    _refuse_nothing_to_sweep(knobs, values, fixed, {"samples": samples, "batch": batch})
    steps = stats.header.steps if steps is None and stats is not None else steps
    guided = guidance_scale > 1
    plans = [
        make_plan(
            policy, stats, model=model, scheduler=scheduler, steps=steps, guidance="batched" if guided else "none",
            **fixed, **dict.fromkeys(knobs, value),
        )
        for value in values
    ]  # fmt: skip
    header = plans[0].header
    evaluation = header.macs * (2 if guided else 1)
    run = _Runs(model, scheduler, samples, guidance_scale, seed, batch)
    shorter = _neighbours(plans, scheduler)
    # Values that make the same plan are run once, under the first one's name.
    distinct = {plan.rows: i for i, plan in reversed(list(enumerate(plans)))}
    total = header.steps + sum(shorter) + header.steps * len(distinct)
    report = on_step or (lambda name, done, total: None)
    done = 0

    def measured(name: str, runner: Any, number: int) -> torch.Tensor:
        nonlocal done
        before, done = done, done + number
        return run.latents(runner, number, lambda d: report(name, before + round(d * number), total))

    reference = measured("full compute", model, header.steps)
    baseline = []
    for number in shorter:
        macs = evaluation * len(prepare_scheduler(scheduler, number).timesteps)
        found = _error(measured(f"fewer steps: {number}", model, number), reference)
        baseline.append(FewerSteps(macs, *found, number))
    errors = {}
    for rows, i in sorted(distinct.items(), key=lambda entry: entry[1]):
        inputs = example_inputs(model, run.rows(min(batch, samples)))
        executable = compile_plan(model, plans[i], inputs, CompileConfig("eager"))
        errors[rows] = _error(measured(f"{', '.join(knobs)} = {values[i]}", executable, header.steps), reference)
    points = tuple(
        SweepPoint(plan.summary().macs * (2 if guided else 1), *errors[plan.rows], value, plan)
        for value, plan in zip(values, plans, strict=True)
    )
    return Sweep(
        policy, knobs, header.model, header.scheduler, header.steps, samples, guidance_scale, seed,
        evaluation * plans[0].steps, points, tuple(baseline),
    )  # fmt: skip


def _refuse_nothing_to_sweep(
    knobs: Sequence[str], values: Sequence[Any], fixed: Mapping[str, Any], sizes: Mapping[str, int]
) -> None:
    if not knobs or not values:
        raise PlanError(f"nothing to sweep: {len(knobs)} knobs and {len(values)} values; expected at least one of each")
    twice = sorted(set(knobs) & set(fixed))
    if twice:
        raise PlanError(f"{twice[0]!r} is swept and given as {fixed[twice[0]]!r} as well; leave one of them out")
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise PlanError(f"{name} is {size!r}; expected a whole number of at least 1")


def _neighbours(plans: Sequence[CachePlan], scheduler: Any) -> list[int]:
    """The numbers of steps, most first, whose MACs lie just below and just above those of the plans."""
    steps = plans[0].header.steps
    evaluations = {n: len(prepare_scheduler(scheduler, n).timesteps) for n in range(1, steps)}
    found = set()
    for plan in plans:
        summary = plan.summary()
        if summary.macs == summary.macs_total:
            continue
        target = plan.steps * summary.macs / summary.macs_total if summary.macs_total else 0.0
        found |= set([n for n, count in evaluations.items() if count <= target][-1:])
        found |= set([n for n, count in evaluations.items() if count >= target][:1])
    return sorted(found, reverse=True)


def _error(latents: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Mean relative L2 over the samples, and its standard error."""
    errors = relative_errors(latents, reference)
    spread = float(errors.std() / len(errors) ** 0.5) if len(errors) > 1 else 0.0
    return float(errors.mean()), spread


class _Runs:
    """Sampling from one fixed noise and conditioning."""

    def __init__(self, model: nn.Module, scheduler: Any, samples: int, guidance_scale: float, seed: int, batch: int) -> None:
        latents = next(iter(example_inputs(model).values()))
        noise = torch.randn(samples, *latents.shape[1:], generator=torch.Generator().manual_seed(seed))
        cond, uncond = family_of(model).conditioning(config_of(model), samples, latents.device)
        guided = {f"negative_{name}": value for name, value in uncond.items()} if guidance_scale > 1 else {}
        self.noise = noise.to(latents.device, model_dtype(model)).split(batch)
        self.conditioning = {name: value.split(batch) for name, value in (cond | guided).items()}
        self.scheduler, self.guidance_scale = scheduler, guidance_scale

    def rows(self, samples: int) -> int:
        """Rows of the model's input for this many samples."""
        return samples * (2 if self.guidance_scale > 1 else 1)

    def latents(self, runner: Any, steps: int, on_share: Callable[[float], None]) -> torch.Tensor:
        """Final latents [samples, ...] on the CPU; `on_share` is told the share done."""
        results = []
        for number, noise in enumerate(self.noise):
            chosen = {name: parts[number] for name, parts in self.conditioning.items()}

            def advance(step: int, all_steps: int, part: int = number) -> None:
                on_share((part + step / all_steps) / len(self.noise))

            result = sample(runner, self.scheduler, noise, self.guidance_scale, steps=steps, on_step=advance, **chosen)
            results.append(result.cpu())
        return torch.cat(results)
