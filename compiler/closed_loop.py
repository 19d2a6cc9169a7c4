"""Fitting forecasts where they will run: on sampling runs in which every step before is already the fitted plan's own.

Coefficients fitted on full runs are wrong at the states that a plan with forecasts reaches, and the more so the further it has
come. Here all samples go through the steps together, in one batch: at a step with forecasts to fit, the whole model is run on
the state that the plan has reached, for the true values; the coefficients that come nearest to them are put into the compiled
step; then that step is run as it will be, and the sampler goes on from what it gives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from stepgraph.compiler.calibrate import check_guidance, check_samples, conditioning_of
from stepgraph.compiler.correct import with_cells
from stepgraph.compiler.describe import marked_graph
from stepgraph.compiler.factors import Factors
from stepgraph.compiler.least_squares import least_squares
from stepgraph.compiler.models import family_of
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.specialize import numbered_forecasts
from stepgraph.compiler.true_values import TrueValues
from stepgraph.config import CompileConfig
from stepgraph.corrections import CONSTANT, Forecast
from stepgraph.fingerprint import model_dtype, refuse_other_model
from stepgraph.liveness import INPUT, VALUE, Read
from stepgraph.plan import FORECAST, CachePlan, PlanError
from stepgraph.runtime.executable import Session
from stepgraph.runtime.sampler import prepare_scheduler, refuse_other_schedule, refuse_stochastic, sample

# No coefficient that anybody fits or writes: a placeholder shares its constant with no other forecast.
PLACEHOLDER = -1e30


@dataclass(frozen=True)
class Runs:
    """The sampling runs that are fitted on.

    Attributes:
        samples: Number of runs; all go through the model in one batch.
        seed: Of the noise.
        guidance_scale: Above 1, classifier-free guidance.
        conditioning: As for `stepgraph.sample`, `samples` rows each; the example conditioning of the model's family unless
            given (classes in turn for DiT).
        ridge: Added to the diagonal of the normal equations, whose terms are scaled to length 1. It only keeps terms that
            depend on each other apart; above 1e-5 it costs accuracy.
        on_step: Called with (steps done, steps in all).
    """

    samples: int = 16
    seed: int = 0
    guidance_scale: float = 1.0
    conditioning: Mapping[str, torch.Tensor] | None = None
    ridge: float = 1e-10
    on_step: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Fitted:
    """What a closed loop found.

    Attributes:
        coefficients: (step, site index) -> per branch [terms] float64, or [terms, C] where every channel has its own.
        residuals: (step, site index) -> the largest, over the branches, relative L2 distance of the forecast from the true
            value, over all samples.
    """

    coefficients: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    residuals: dict[tuple[int, int], float] = field(default_factory=dict)


def fit_in_closed_loop(
    plan: CachePlan,
    model: nn.Module,
    scheduler: Any,
    cells: Mapping[tuple[int, int], Sequence[str]],
    runs: Runs,
    factors: Factors | None = None,
    per_channel: bool = False,
) -> Fitted:
    """Fit the coefficients of some FORECASTs of a plan, step after step.

    The sites of one step are fitted together, on the true values of one evaluation of the whole model: what a site's forecast
    does to the sites behind it within the same step is not seen there, but in the states that follow.

    Args:
        plan: The plan; its other FORECASTs have coefficients.
        model: The plan's model.
        scheduler: The plan's scheduler.
        cells: (step, site index) -> terms to fit.
        runs: What is sampled.
        factors: Where the plan has LOWRANK sites.
        per_channel: Whether every channel gets coefficients of its own.

    Raises:
        PlanError: Another model or scheduler than the plan's, a stochastic one, or settings out of range.
    """
    refuse_other_model(plan.header, model)
    refuse_other_schedule(plan.header, prepare_scheduler(scheduler, plan.header.steps), "the given scheduler")
    refuse_stochastic(scheduler, plan.header.steps)
    check_samples(runs.samples, 1)
    _check_guidance_fits(plan, check_guidance(runs.guidance_scale))
    if isinstance(runs.ridge, bool) or not isinstance(runs.ridge, (int, float)) or not 0 < runs.ridge < 1:
        raise PlanError(f"ridge is {runs.ridge!r}; expected a number between 0 and 1, such as 1e-10")
    weight, shape = next(model.parameters()), next(iter(plan.header.shapes.values()))
    given = conditioning_of(model, runs.conditioning, runs.samples, runs.guidance_scale > 1, weight.device)
    generator = torch.Generator().manual_seed(runs.seed)
    noise = torch.cat([torch.randn((1, *shape), generator=generator) for _ in range(runs.samples)])
    loop = ClosedLoop(plan, model, cells, runs.ridge, factors, per_channel)
    noise = noise.to(weight.device, model_dtype(model))
    sample(loop, scheduler, noise, runs.guidance_scale, steps=plan.header.steps, on_step=runs.on_step, **given)
    return loop.fitted


def _check_guidance_fits(plan: CachePlan, guided: bool) -> None:
    wanted = plan.header.guidance
    if wanted == "separate" and not guided:
        raise PlanError("the plan has one branch each for cond and uncond; pass a guidance_scale above 1")
    if wanted == "none" and guided:
        raise PlanError("the plan is for sampling without guidance; leave guidance_scale at 1")


class ClosedLoop(nn.Module):
    """Called like the model during a sampling run, it answers by the plan and fits what is open before each step.

    `observed` is the model, for whoever needs its signature. Both guidance halves come in one batch; a plan with a branch for
    each takes them apart.
    """

    def __init__(
        self,
        plan: CachePlan,
        model: nn.Module,
        cells: Mapping[tuple[int, int], Sequence[str]],
        ridge: float,
        factors: Factors | None,
        per_channel: bool,
    ) -> None:
        super().__init__()
        self.observed, self.plan, self.cells, self.ridge = model, plan, dict(cells), ridge
        self.factors, self.per_channel = factors, per_channel
        self.timestep = family_of(model).timestep
        self.fitted = Fitted()
        self.truth: TrueValues | None = None
        self.session: Session | None = None

    def forward(self, return_dict: bool = False, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One step, all branches."""
        if self.timestep != 1:
            inputs["timestep"] = inputs["timestep"] * self.timestep
        branches = len(self.plan.header.branches)
        parts = {name: value.chunk(branches) for name, value in inputs.items()}
        results = [self._evaluate({name: part[branch] for name, part in parts.items()}) for branch in range(branches)]
        return (torch.cat(results),)

    def _evaluate(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """One branch of a step: fit, then run."""
        if self.session is None:
            self._compile(inputs)
        assert self.session is not None
        assert self.truth is not None
        step, branch = self.session.step, self.session.branch
        wanted = {i: terms for (s, i), terms in self.cells.items() if s == step}
        true = self.truth(inputs) if wanted else {}
        stored, latents = self.session.stored(), inputs[next(iter(self.plan.header.shapes))]
        for i, terms in wanted.items():
            values = [_term(term, i, latents, stored) for term in terms]
            target = true[i]
            # Behind the prediction, models with a learned variance return that; samplers drop it.
            if self.plan.sites[i].kind == "output" and target.shape[1] == 2 * latents.shape[1]:
                values = [value if value is None else value[:, : latents.shape[1]] for value in values]
                target = target[:, : latents.shape[1]]
            self._fit(step, i, branch, values, target)
        result: torch.Tensor = self.session(return_dict=False, **inputs)[0]
        return result

    def _compile(self, inputs: dict[str, torch.Tensor]) -> None:
        """Compile the plan with placeholders, for inputs of the shapes that occur."""
        marked = marked_graph(self.observed, inputs)
        self.truth = TrueValues(marked, self.observed, sorted({i for _, i in self.cells}))
        forecasts, affine, branches = {}, dict[str, torch.Tensor](), len(self.plan.header.branches)
        for (step, i), terms in self.cells.items():
            placeholder = ((PLACEHOLDER * (i + 1),) * len(terms),) * branches
            forecasts[step, i] = Forecast(tuple(terms), () if self.per_channel else placeholder)
            if self.per_channel:
                affine[f"{self.plan.sites[i].name}/{step}"] = torch.zeros(len(terms), self.truth.channels[i])
        plan, factors = with_cells(self.plan, dict.fromkeys(self.cells, FORECAST), forecasts, {}), self.factors
        if affine:
            plan = plan.with_header(factors="")
            factors = with_affine(factors, affine, self.plan)
        self.session = compile_plan(self.observed, plan, inputs, CompileConfig("eager"), factors).session()

    def _fit(self, step: int, i: int, branch: int, values: list[torch.Tensor | None], target: torch.Tensor) -> None:
        """Solve for one site's coefficients and put them into the compiled step."""
        assert self.session is not None
        found, residual = least_squares(values, target, self.ridge, self.per_channel)
        if not found.isfinite().all():
            name = self.plan.sites[i].name
            raise PlanError(f"step {step}, site {name}: the fit is not finite: NaN or infinite values in the model's run")
        self.fitted.coefficients.setdefault((step, i), []).append(found)
        self.fitted.residuals[step, i] = max(residual, self.fitted.residuals.get((step, i), 0.0))
        program = self.session.executable.default
        _, number = numbered_forecasts(program.plan, step)[i]
        # The executable was made for this loop alone, and this constant for this site alone.
        program.constants[step][branch][number].copy_(found)


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
    return Factors(header.model, header.fingerprint, header.dtype, "affine", {}, {}, dict(affine))
