"""Covariances of the increments that linear maps see between the computed steps of a cached sampling run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepgraph.checked import check_fields, checked
from stepgraph.checks import check_number, check_whole, is_whole
from stepgraph.compiler.calibration.calibrate import check_guidance, check_samples, digest
from stepgraph.compiler.lowrank.check_moments import check_moments
from stepgraph.compiler.lowrank.covariance_passes import PassResults, new_sum, plan_passes
from stepgraph.compiler.lowrank.increments import Watcher, find_targets, sampled_rows
from stepgraph.compiler.lowrank.plan_increments import PlanRuns, PlanWatcher
from stepgraph.compiler.marking.describe import make_header
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.errors import ArgumentError, FileFormatError, PlanError
from stepgraph.files.tensor_record import read_tensor_record, write_tensor_record
from stepgraph.fingerprint import model_dtype
from stepgraph.inputs import latents_of
from stepgraph.plan import CachePlan, PlanHeader
from stepgraph.plan.factors import Factors
from stepgraph.plan.json import parse_record
from stepgraph.runtime.sampling.sample import sample
from stepgraph.schedule import Schedule, counted_steps
from stepgraph.scheduler import refuse_stochastic
from stepgraph.wrapped_models import refuse_around_measuring, unwrapped

FORMAT = "stepgraph-covariances"
VERSION = 1


@dataclass(frozen=True, eq=False)
class Covariances:
    """Second moments of increments dx = x_t - x_(last computed step), over tokens, samples, branches and skipped steps.

    Attributes:
        header: Model, scheduler and steps they belong to, with seed and number of samples.
        guidance_scale: Of the runs; 1 for none.
        periods: Every how many steps a plan computes; increments of several periods count alike. Empty where a plan was given.
        conditioning: Digest of the conditioning that was passed in; empty for the family's example conditioning.
        inputs: Module path of a linear map (in whole mode also of a site's module) -> name of what it reads.
        tensors: "xx/<name>" E[dx dx^T] [C, C], or "sketch/<name>" S [l, C] with S^T S below it; "yx/<site>" E[dy dx^T]
            [C_out, C] in whole mode; all float32.
        numbers: Per name: rows, trace E||dx||^2, fourth E||dx||^4; for sketches removed, a bound on the spectral norm of
            E[dx dx^T] - S^T S. Per site in whole mode: yy, E||dy||^2.
        passes: How many times the sampling runs were made to keep to the memory limit.
        plan: Digest of the corrected plan whose own runs were measured; empty for runs of the full model.
    """

    header: PlanHeader
    guidance_scale: float
    periods: tuple[int, ...]
    conditioning: str
    inputs: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Mapping[str, float]]
    passes: int = 1
    plan: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "the covariances' ")

    @checked
    def name_of(self, path: str) -> str:
        """Name of what a linear map, or a site's module, reads.

        Raises:
            PlanError: It was not measured.
        """
        if path not in self.inputs:
            raise PlanError(f"no covariance of {path!r} was measured; measure it with its kind among kinds, or with whole=True")
        return self.inputs[path]

    @checked
    def matrix(self, path: str) -> Tensor:
        """E[dx dx^T] of what a module reads, [C, C] float64.

        From a sketch it is S^T S, and what that lacks of the trace in all directions alike.

        Raises:
            PlanError: It was not measured, or the increments are not finite or all zero.
        """
        name = self.name_of(path)
        if name not in self.numbers or not {f"sketch/{name}", f"xx/{name}"} & set(self.tensors):
            raise PlanError(
                f"the covariances lack the tensor or the numbers of {name!r}, which {path!r} reads; measure them anew"
            )
        trace = self.numbers[name]["trace"]
        if f"sketch/{name}" in self.tensors:
            sketch = self.tensors[f"sketch/{name}"].double()
            covariance = sketch.T @ sketch
            lacking = max(trace - float(covariance.diagonal().sum()), 0.0) / len(covariance)
            covariance.diagonal().add_(lacking)
        else:
            covariance = self.tensors[f"xx/{name}"].double()
        if not covariance.isfinite().all():
            raise PlanError(f"the covariance of {path!r} is degenerate: it holds NaN or infinite values")
        if trace <= 0 or not float(covariance.diagonal().sum()) > 0:
            raise PlanError(
                f"the covariance of {path!r} is degenerate: what it reads never changes, so nothing is to be corrected; leave "
                f"its kind out of kinds"
            )
        return covariance

    @checked
    def directions(self, path: str) -> int | None:
        """How many directions the sketch of what a map reads has; None where its whole covariance was measured."""
        name = f"sketch/{self.name_of(path)}"
        return self.tensors[name].shape[0] if name in self.tensors else None

    @checked
    def cross(self, site: str) -> tuple[Tensor, float]:
        """E[dy dx^T] [C_out, C] float64 and E||dy||^2 of a site's module.

        Raises:
            PlanError: Whole modules were not measured.
        """
        if f"yx/{site}" not in self.tensors:
            raise PlanError(f"the outputs of {site!r} were not measured; measure with whole=True")
        covariance = self.tensors[f"yx/{site}"].double()
        if not covariance.isfinite().all() or self.numbers[site]["yy"] <= 0:
            raise PlanError(f"the covariance of {site!r} is degenerate: its output never changes, or is not finite")
        return covariance, self.numbers[site]["yy"]

    @property
    def sketch_errors(self) -> dict[str, float]:
        """For sketches: the share of E||dx||^2 that a direction can at most lack, per name; empty for whole covariances."""
        return {name: n["removed"] / max(n["trace"], 1e-300) for name, n in self.numbers.items() if "removed" in n}

    @checked
    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose metadata is the rest as JSON; it appears whole or not at all."""
        names = ("guidance_scale", "periods", "conditioning", "inputs", "numbers", "passes", "plan")
        described = {name: getattr(self, name) for name in names} | {"header": asdict(self.header)}
        write_tensor_record(path, FORMAT, VERSION, described, {name: self.tensors[name] for name in self.tensors})

    @classmethod
    @checked
    def load(cls, path: str | Path) -> "Covariances":
        """Read a file written by `save`.

        Raises:
            PlanError: The file is not a complete covariances file of this version.
        """
        described, tensors = read_tensor_record(path, FORMAT, VERSION, "make covariances with stepgraph.measure_covariances")
        header = parse_record(PlanHeader, described.get("header"), f"{path}: header")
        try:
            inputs, numbers, periods = dict(described["inputs"]), dict(described["numbers"]), tuple(described["periods"])
            scale, used, passes = float(described["guidance_scale"]), str(described["conditioning"]), int(described["passes"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: its metadata is not complete ({type(error).__name__}: {error})") from error
        try:
            check_moments(inputs, tensors, numbers)
        except PlanError as error:
            raise FileFormatError(f"{path}: {error}") from error
        return cls(header, scale, periods, used, inputs, tensors, numbers, passes, str(described.get("plan", "")))


@checked
def measure_covariances(
    model: nn.Module,
    scheduler: Any,
    *,
    steps: int | None = None,
    samples: int = 8,
    seed: int = 0,
    guidance_scale: float = 1.0,
    period: int | Sequence[int] | None = None,
    plan: CachePlan | None = None,
    factors: Factors | None = None,
    conditioning: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    kinds: Sequence[str] | None = None,
    whole: bool = False,
    memory_gb: float | None = None,
    sketch: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
) -> Covariances:
    """Run the sampler and average dx dx^T of what every linear map inside module sites reads.

    The runs are those of the full model, from the noise of `seed`; dx is the difference from the last step that a plan of the
    given period computes, so that only skipped steps count. With a corrected plan the runs are its own instead: the full model
    is evaluated on the states that the plan comes to, and dx counts at its LOWRANK steps, from the value at the site's last
    COMPUTE (or from the forecast that its increments are taken around). Factors of full runs are what such a plan is first
    run with; factors made of its own runs are fitted where they will be used.

    Args:
        model: On any device.
        scheduler: A deterministic diffusers scheduler; it is copied and not changed.
        steps: Number of inference steps; 50, or the plan's, unless given.
        samples: Number of sampling runs, one sample each.
        seed: Of the noise.
        guidance_scale: Above 1, classifier-free guidance in one batch; both halves count.
        period: Every how many steps a plan computes, at least 2; or several such numbers. 2 unless given; not with a plan.
        plan: A plan with LOWRANK sites, on whose own runs to measure; these sites alone are measured.
        factors: Its factors.
        conditioning: As for `stepgraph.calibrate`.
        inputs: The forward's arguments, where the shapes of the conditioning, or the model's usual ones, are not meant; two
            rows with guidance, else one.
        kinds: Of the sites whose maps are measured; all module sites unless given.
        whole: Measure the sites' own inputs and outputs too, for factors of the method "whole".
        memory_gb: Most gigabytes (10^9 bytes) that the sums, and the values of two steps they are made from, may take. Where
            all do not fit, the same runs are made several times, each time for as many maps as fit; what is finished lies
            in a temporary folder and is read from there.
        sketch: Keep this many directions per map instead of whole covariances; at least twice the rank that is wanted.
        on_step: Called with (evaluations done, evaluations in all passes).
        schedule: As for `stepgraph.calibrate`; a plan brings its own.

    Raises:
        PlanError: An argument is out of range, the sampler adds noise, one map alone exceeds the memory, whole modules are to
            be sketched, or the plan has no LOWRANK sites or is for something else.
    """
    return covariances_traced(
        TracedModel(unwrapped(model)), scheduler, steps=steps, samples=samples, seed=seed, guidance_scale=guidance_scale,
        period=period, plan=plan, factors=factors, conditioning=conditioning, inputs=inputs, kinds=kinds, whole=whole,
        memory_gb=memory_gb, sketch=sketch, on_step=on_step, schedule=schedule,
    )  # fmt: skip


def covariances_traced(
    traced: TracedModel, scheduler: Any, *, steps: int | None, samples: int, seed: int, guidance_scale: float,
    period: int | Sequence[int] | None = None, plan: CachePlan | None = None, factors: Factors | None = None,
    conditioning: Mapping[str, Any] | None = None, inputs: Mapping[str, Any] | None = None, kinds: Sequence[str] | None = None,
    whole: bool = False, memory_gb: float | None = None, sketch: int | None = None,
    on_step: Callable[[int, int], None] | None = None, schedule: Schedule | Mapping[str, Any] | None = None,
) -> Covariances:  # fmt: skip
    """`measure_covariances`, on the graphs of a traced model, so that it is traced for no signature twice."""
    model = traced.model
    refuse_around_measuring(next(model.parameters()).device)
    check_samples(samples, 1)
    guided = check_guidance(guidance_scale)
    wish = plan.header.schedule if plan is not None and schedule is None else schedule
    periods = _periods_of(steps, period, plan, factors)
    chosen, steps = counted_steps(wish, steps, scheduler, 50 if plan is None else plan.header.steps)
    if plan is not None and chosen != plan.header.schedule:
        raise ArgumentError(f"the plan's schedule has {plan.header.schedule}, asked for is {chosen}; leave out schedule")
    _check_limits(memory_gb, sketch, whole)
    guidance = plan.header.guidance if plan is not None else "batched" if guided else "none"
    example = dict(inputs or traced.example_inputs(2 if guided and guidance == "batched" else 1, conditioning))
    marked = traced.marked(example)
    header = make_header(model, scheduler, steps, marked, guidance, chosen)
    refuse_stochastic(scheduler, steps, header.schedule)
    header = replace(header, seed=seed, samples=samples)
    evaluations = len(header.timesteps)
    if evaluations <= 1:
        raise ArgumentError(
            f"{steps} steps are {evaluations} evaluation of the model, in which nothing changes; take more steps"
        )
    runs = PlanRuns(plan, factors, traced, scheduler, example, guidance_scale) if plan is not None else None
    targets = find_targets(model, marked, kinds, whole, runs.corrected if runs is not None else None)
    if not targets:
        raise ArgumentError(f"the plan corrects no site of the kinds {list(kinds or ())}; leave out kinds")
    groups = plan_passes(targets, memory_gb, sketch, runs.ages if runs is not None else len(periods))
    measured = PassResults(groups, samples * evaluations, on_step)
    latents = latents_of(example)
    for pass_index, group in enumerate(groups):
        sums = {target: new_sum(target, sketch, latents.device) for target in group}
        watcher = Watcher(model, marked, sums, periods) if runs is None else PlanWatcher(model, marked, sums, runs)
        generator = torch.Generator().manual_seed(seed)
        for run, rows in enumerate(sampled_rows(traced, conditioning, samples, guided, latents.device)):
            noise = torch.randn((1, *latents.shape[1:]), generator=generator).to(latents.device, model_dtype(model))
            report = measured.reporter(pass_index, run, evaluations)
            watcher.begin()
            if isinstance(watcher, PlanWatcher):
                watcher.run(noise, rows, report)
                continue
            sample(watcher, scheduler, noise, guidance_scale, steps=steps, schedule=header.schedule, on_step=report, **rows)
        measured.keep(pass_index, sums)
    return Covariances(
        header,
        float(guidance_scale),
        periods,
        digest(conditioning),
        measured.inputs,
        measured.tensors,
        measured.numbers,
        len(groups),
        runs.digest if runs is not None else "",
    )


def _periods_of(
    steps: int | None, period: int | Sequence[int] | None, plan: CachePlan | None, factors: Factors | None
) -> tuple[int, ...]:
    """The periods of a calibration, with defaults; a plan has its own steps and no period."""
    if plan is None:
        if factors is not None:
            raise ArgumentError("factors are given without the plan that they correct; pass plan= too")
        return _periods(2 if period is None else period)
    if period is not None:
        raise ArgumentError(f"period is {period!r}, but a plan is given, which says itself what it computes; leave out period")
    if steps is not None and steps != plan.header.steps:
        raise ArgumentError(f"the plan is of {plan.header.steps} steps, asked for are {steps}; leave out steps")
    return ()


def _periods(period: int | Sequence[int]) -> tuple[int, ...]:
    periods = (period,) if isinstance(period, int) else tuple(period)
    if not periods or not all(is_whole(each, 2) for each in periods):
        raise ArgumentError(f"period is {period!r}; expected a whole number of at least 2, or several")
    return tuple(sorted(set(periods)))


def _check_limits(memory_gb: float | None, sketch: int | None, whole: bool) -> None:
    if memory_gb is not None:
        check_number("memory_gb", memory_gb, above=0)
    if sketch is not None:
        check_whole("sketch", sketch, 2, tail=": twice the rank that is wanted")
    if sketch is not None and whole:
        raise ArgumentError("whole modules need whole covariances; leave out sketch, and keep to the memory by memory_gb")
