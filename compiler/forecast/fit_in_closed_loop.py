"""Fitting forecasts where they will run: on sampling runs in which every step before is already the fitted plan's own.

Coefficients fitted on full runs are wrong at the states that a plan with forecasts reaches, and the more so the further it has
come. Here all samples go through the steps together, in one batch, and beside them the same samples in full: at a step with
forecasts to fit, the coefficients that come nearest to their target are put into the compiled step; then that step is run as it
will be, and the sampler goes on from what it gives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from stepgraph.checks import check_number
from stepgraph.compiler.calibration.calibrate import check_guidance, check_samples, conditioning_of
from stepgraph.compiler.calibration.trajectory import Trajectory
from stepgraph.compiler.forecast.correct_plan import with_cells
from stepgraph.compiler.forecast.least_squares import least_squares
from stepgraph.compiler.forecast.site_values import SiteValues
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.specializing.coefficients import numbered_forecasts
from stepgraph.config import CompileConfig
from stepgraph.errors import PlanError
from stepgraph.fingerprint import model_dtype
from stepgraph.inputs import latents_of
from stepgraph.plan import FORECAST, CachePlan
from stepgraph.plan.corrections import CONSTANT, Forecast
from stepgraph.plan.factors import AFFINE, Factors
from stepgraph.plan.liveness import INPUT, VALUE, Read
from stepgraph.plan.refuse_other import refuse_other_model, refuse_other_schedule
from stepgraph.runtime.session.session import Session
from stepgraph.scheduler import prepare_scheduler, refuse_stochastic, without_variance

# No coefficient that anybody fits or writes: a placeholder shares its constant with no other forecast.
PLACEHOLDER = -1e30
STATE, FULL, OWN = "state", "full", "own"
Cells = Mapping[tuple[int, int], Sequence[str]]


@dataclass(frozen=True)
class FitRuns:
    """The sampling runs that are fitted on.

    Attributes:
        samples: Number of runs; all go through the model in one batch.
        seed: Of the noise.
        guidance_scale: Above 1, classifier-free guidance.
        conditioning: As for `stepgraph.sample`, `samples` rows each; the example conditioning of the model's family unless
            given (classes in turn for DiT).
        target: What forecasts shall come near to. "state" (of `output` only): the output with which the sampler lands on the
            next state of the full run, so that what went wrong before is mended too. "full": the value in the full run. "own":
            the value that the whole model has on the run's own state.
        per_branch: With the target "state", whether the branches of a plan with separate guidance get coefficients of their
            own. On the small DiT that is worth 0-3 %, and what was fitted at one guidance scale is then up to three times worse
            at another, where shared coefficients are as good as refitted ones. With other targets they have their own.
        ridge: Added to the diagonal of the normal equations, whose terms are scaled to length 1. It only keeps terms that
            depend on each other apart; above 1e-5 it costs accuracy.
        on_step: Called with (steps done, steps in all).
    """

    samples: int = 16
    seed: int = 0
    guidance_scale: float = 1.0
    conditioning: Mapping[str, torch.Tensor] | None = None
    target: str = OWN
    per_branch: bool = False
    ridge: float = 1e-10
    on_step: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        check_samples(self.samples, 1)
        check_guidance(self.guidance_scale)
        if self.target not in (STATE, FULL, OWN):
            raise PlanError(f"target is {self.target!r}; expected {STATE}, {FULL} or {OWN}")
        check_number("ridge", self.ridge, above=0, below=1, tail=", such as 1e-10")


@dataclass(frozen=True)
class Fitted:
    """What a closed loop found.

    Attributes:
        coefficients: (step, site index) -> per branch [terms] float64, or [terms, C] where every channel has its own.
        residuals: (step, site index) -> relative L2 distance of the forecast from its target over all samples, the largest of
            the branches.
    """

    coefficients: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    residuals: dict[tuple[int, int], float] = field(default_factory=dict)


def fit_in_closed_loop(
    plan: CachePlan,
    traced: TracedModel,
    scheduler: Any,
    cells: Cells,
    runs: FitRuns,
    factors: Factors | None = None,
    per_channel: bool = False,
) -> Fitted:
    """Fit the coefficients of some FORECASTs of a plan, step after step.

    The sites of one step are fitted together, on the values of one evaluation of the whole model: what a site's forecast does
    to the sites behind it within the same step is not seen there, but in the states that follow.

    Args:
        plan: The plan; its other FORECASTs have coefficients.
        traced: The plan's model.
        scheduler: The plan's scheduler.
        cells: (step, site index) -> terms to fit.
        runs: What is sampled.
        factors: Where the plan has LOWRANK sites.
        per_channel: Whether every channel gets coefficients of its own.

    Raises:
        PlanError: Another model or scheduler than the plan's, a stochastic one, or settings that do not go with the plan.
    """
    model = traced.model
    refuse_other_model(plan.header, model)
    prepared = prepare_scheduler(scheduler, plan.header.steps, schedule=plan.header.schedule)
    refuse_other_schedule(plan.header, prepared, "the given scheduler")
    refuse_stochastic(scheduler, plan.header.steps, plan.header.schedule)
    guided, weight = runs.guidance_scale > 1, next(model.parameters())
    if plan.header.guidance == "separate" and not guided:
        raise PlanError("the plan has one branch each for cond and uncond; pass a guidance_scale above 1")
    if plan.header.guidance == "none" and guided:
        raise PlanError("the plan is for sampling without guidance; leave guidance_scale at 1")
    generator, shape = torch.Generator().manual_seed(runs.seed), latents_of(plan.header.shapes)
    noise = torch.cat([torch.randn((1, *shape), generator=generator) for _ in range(runs.samples)])
    noise = noise.to(weight.device, model_dtype(model))
    conditioning = conditioning_of(traced, runs.conditioning, runs.samples, guided, weight.device)
    own_run, full_run = (Trajectory(plan.header, model, scheduler, noise, runs.guidance_scale, conditioning) for _ in range(2))
    loop = ClosedLoop(plan, traced, cells, own_run.inputs()[0], runs, factors, per_channel)
    with torch.no_grad():
        for step in range(plan.steps):
            loop.step(own_run, full_run)
            if runs.on_step is not None:
                runs.on_step(step + 1, plan.steps)
    return loop.fitted


class ClosedLoop:
    """A compiled plan with placeholders for the coefficients that are still to be found, and its run.

    Attributes:
        fitted: What has been found so far.
    """

    def __init__(
        self,
        plan: CachePlan,
        traced: TracedModel,
        cells: Cells,
        inputs: Mapping[str, torch.Tensor],
        runs: FitRuns,
        factors: Factors | None,
        per_channel: bool,
    ) -> None:
        self.plan, self.cells, self.runs, self.per_channel = plan, dict(cells), runs, per_channel
        self.fitted = Fitted()
        sites = () if runs.target == STATE else sorted({i for _, i in cells})
        self.whole = SiteValues(traced.marked(inputs), traced.model, sites)
        self.session = self._compiled(traced, inputs, factors)

    def _compiled(self, traced: TracedModel, inputs: Mapping[str, torch.Tensor], factors: Factors | None) -> Session:
        """A session of the plan with placeholders."""
        forecasts, affine, branches = {}, dict[str, torch.Tensor](), len(self.plan.header.branches)
        for (step, i), terms in self.cells.items():
            placeholder = ((PLACEHOLDER * (i + 1),) * len(terms),) * branches
            forecasts[step, i] = Forecast(tuple(terms), () if self.per_channel else placeholder)
            if self.per_channel:
                affine[f"{self.plan.sites[i].name}/{step}"] = torch.zeros(len(terms), self.whole.channels[i])
        plan = with_cells(self.plan, dict.fromkeys(self.cells, FORECAST), forecasts, {})
        if affine:
            plan, factors = plan.with_header(factors=""), with_affine(factors, affine, self.plan)
        return compile_plan(traced.model, plan, inputs, CompileConfig("eager", exact=True), factors, traced).session()

    def step(self, corrected: Trajectory, full: Trajectory) -> None:
        """One step of both runs; what is open is fitted first."""
        step, inputs = self.session.step, corrected.inputs()
        wanted = {i: terms for (s, i), terms in self.cells.items() if s == step}
        true: list[dict[int, torch.Tensor]] = []
        if self.runs.target == OWN:
            true = [self.whole(call)[1] for call in inputs] if wanted else []
        else:
            evaluated = [self.whole(call) for call in full.inputs()]
            true = [values for _, values in evaluated]
            full.advance([output for output, _ in evaluated])
        if wanted and self.runs.target == STATE:
            self._land(step, wanted, corrected, full.latents)
        elif wanted:
            for branch, (call, targets) in enumerate(zip(inputs, true, strict=True)):
                self._fit_sites(step, branch, wanted, corrected.noisy(call), targets)
        corrected.advance([self.session(return_dict=False, **call)[0] for call in inputs])

    def _fit_sites(
        self,
        step: int,
        branch: int,
        wanted: Mapping[int, Sequence[str]],
        latents: torch.Tensor,
        targets: Mapping[int, torch.Tensor],
    ) -> None:
        """Fit every open site of a branch to its target."""
        stored = self.session.stored(branch)
        for i, terms in wanted.items():
            values, target = [_term(term, i, latents, stored) for term in terms], targets[i]
            # Samplers drop a learned variance.
            if self.plan.sites[i].kind == "output":
                values = [value if value is None else without_variance(value, latents.shape[1]) for value in values]
                target = without_variance(target, latents.shape[1])
            coefficients, residual = least_squares(values, target, self.runs.ridge, self.per_channel)
            self._take(step, i, branch, coefficients, residual)

    def _land(self, step: int, wanted: Mapping[int, Sequence[str]], corrected: Trajectory, state: torch.Tensor) -> None:
        """Fit the model's output, all branches together, so that the sampler comes to a state."""
        target, inputs = corrected.landing(state), corrected.inputs()
        everyone = tuple(range(len(inputs)))
        for i, terms in wanted.items():
            columns, owners = list[torch.Tensor | None](), list[tuple[int, ...]]()
            for term in terms:
                # Inputs are the same in all branches, and so are their coefficients.
                apart = self.runs.per_branch and term.startswith("y")
                for members in [(branch,) for branch in everyone] if apart else [everyone]:
                    columns.append(self._column(term, i, corrected, inputs, members))
                    owners.append(members)
            coefficients, residual = least_squares(columns, target, self.runs.ridge)
            for branch in everyone:
                mine = [k for k, members in enumerate(owners) if branch in members]
                self._take(step, i, branch, coefficients[mine], residual)

    def _column(
        self, term: str, i: int, corrected: Trajectory, inputs: Sequence[Mapping[str, torch.Tensor]], members: tuple[int, ...]
    ) -> torch.Tensor | None:
        """What a term adds to the guided output, per unit of its coefficient in some of the branches; None for a constant."""
        values = []
        for branch, call in enumerate(inputs):
            value = _term(term, i, corrected.noisy(call), self.session.stored(branch))
            if value is None:
                return None
            values.append(value if branch in members else torch.zeros_like(value))
        return corrected.combined(values)

    def _take(self, step: int, i: int, branch: int, coefficients: torch.Tensor, residual: float) -> None:
        """Write down coefficients and let the session take them at this step."""
        if not coefficients.isfinite().all():
            name = self.plan.sites[i].name
            raise PlanError(f"step {step}, site {name}: the fit is not finite: NaN or infinite values in the model's run")
        self.fitted.coefficients.setdefault((step, i), []).append(coefficients)
        self.fitted.residuals[step, i] = max(residual, self.fitted.residuals.get((step, i), 0.0))
        # This constant is this site's alone: no other forecast has the placeholder.
        _, constant = numbered_forecasts(self.session.executable.default.plan, step)[i]
        self.session.use_constant(step, branch, constant, coefficients)


def _term(term: str, i: int, latents: torch.Tensor, stored: Mapping[Read, tuple[torch.Tensor, ...]]) -> torch.Tensor | None:
    """The value of a forecast's term; None for the constant."""
    if term == CONSTANT:
        return None
    if term == "x0":
        return latents
    part = VALUE if term.startswith("y") else INPUT
    return stored[Read(i, part, int(term[1:]))][0]


def with_affine(factors: Factors | None, affine: Mapping[str, torch.Tensor], plan: CachePlan) -> Factors:
    """Factors with more coefficients per channel; without any others where none are given."""
    if factors is not None:
        return replace(factors, affine={**factors.affine, **affine})
    header = plan.header
    return Factors(header.model, header.fingerprint, header.dtype, AFFINE, {}, {}, dict(affine), facts=header.facts)
