"""Correctors that run the model: forecasts whose coefficients are least-squares fits on the plan's own sampling runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from stepgraph.checked import checked
from stepgraph.compiler.forecast.correct_plan import chosen, find_cells, with_cells
from stepgraph.compiler.forecast.fit_in_closed_loop import (
    FULL,
    OWN,
    STATE,
    Cells,
    FitRuns,
    Fitted,
    fit_in_closed_loop,
    with_affine,
)
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.errors import ArgumentError, PlanError
from stepgraph.plan import COMPUTE, FORECAST, REUSE, CachePlan
from stepgraph.plan.corrections import CONSTANT, Forecast
from stepgraph.plan.factors import Factors
from stepgraph.wrapped_models import unwrapped

WHOLE_STEP = ("y1", "y2", "x0", "x1")
TARGETS = (STATE, FULL, OWN)


@checked
def fit_whole_step(
    plan: CachePlan,
    model: nn.Module,
    scheduler: Any,
    *,
    terms: Sequence[str] = WHOLE_STEP,
    samples: int = 16,
    seed: int = 0,
    guidance_scale: float = 1.0,
    conditioning: Mapping[str, Any] | None = None,
    target: str = STATE,
    per_branch: bool = False,
    ridge: float = 1e-10,
    factors: Factors | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> CachePlan:
    """The fitted whole-step rule: four scalars a skipped step, in place of the model.

    At every step that reuses (or forecasts) `output`, the model's output becomes a combination of its last two computed outputs
    y1, y2, its input now x0, and its input at the last computed step x1; behind the first computed step of [y1, x0, x1].
    Inputs are as the model sees them, after the scheduler's scaling. The coefficients are those with which the sampler comes
    nearest to the next state of the full run. Where the model returns a learned variance too, the fit is on the channels that
    the sampler uses.

    Args:
        plan: Any plan with skipped steps, such as `make_plan("interval", kinds=["output"], ...)`. On the steps that it computes
            modules may be reused, corrected or forecast as it says: the fit runs exactly those.
        model: The plan's model.
        scheduler: The plan's scheduler; any deterministic one.
        terms: What is combined.
        samples: Sampling runs to fit on, all in one batch; a handful is enough.
        seed: Of their noise.
        guidance_scale: Above 1, they run with classifier-free guidance.
        conditioning: As for `stepgraph.sample`, `samples` rows each; the model's example conditioning unless given.
        target: "state": the next state of the full run, which mends what went wrong before; "full": the model's output in the
            full run; "own": its output on the run's own state. On the small DiT the latter two have twice the error.
        per_branch: See `stepgraph.compiler.forecast.fit_in_closed_loop.FitRuns`.
        ridge: See `stepgraph.compiler.forecast.fit_in_closed_loop.FitRuns`.
        factors: Where the plan has LOWRANK sites.
        on_step: Called with (steps done, steps in all).

    Raises:
        PlanError: The plan skips no step, or it, the model and the scheduler do not belong together.
    """
    runs = FitRuns(samples, seed, guidance_scale, conditioning, target, per_branch, ridge, on_step)
    return fit_traced(plan, TracedModel(unwrapped(model)), scheduler, runs, terms, factors)


def fit_traced(
    plan: CachePlan,
    traced: TracedModel,
    scheduler: Any,
    runs: FitRuns,
    terms: Sequence[str] = WHOLE_STEP,
    factors: Factors | None = None,
) -> CachePlan:
    """`fit_whole_step`, on the graphs of a traced model, so that it is traced for no signature twice."""
    if not any(letter in (REUSE, FORECAST) for row in plan.rows for s, letter in zip(plan.sites, row) if s.kind == "output"):
        raise PlanError(
            "the plan skips no step: nowhere is `output` reused or forecast; make one with "
            "make_plan('interval', kinds=['output'], every=2, ...)"
        )
    return _fitted_plan(plan, traced, scheduler, terms, ["output"], None, runs, factors, "fit_whole_step")


@checked
def fit_forecast(
    plan: CachePlan,
    model: nn.Module,
    scheduler: Any,
    *,
    terms: Sequence[str] = ("y1", "y2"),
    kinds: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    samples: int = 16,
    seed: int = 0,
    guidance_scale: float = 1.0,
    conditioning: Mapping[str, Any] | None = None,
    target: str = FULL,
    ridge: float = 1e-10,
    factors: Factors | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> CachePlan:
    """Fitted scalars for every reused or forecast value, per site and step.

    The sites of a step are fitted together on one evaluation of the whole model (`fit_in_closed_loop`).

    Args:
        plan: The plan.
        model: The plan's model.
        scheduler: The plan's scheduler; any deterministic one.
        terms: What is combined; a step before which fewer values are stored leaves the oldest out.
        kinds: Kinds of the sites; all unless given.
        sites: Their names, likewise.
        samples: Sampling runs to fit on, all in one batch.
        seed: Of their noise.
        guidance_scale: Above 1, they run with classifier-free guidance.
        conditioning: As for `stepgraph.sample`, `samples` rows each; the model's example conditioning unless given.
        target: "full": the values in the full run; "own": those that the whole model has on the run's own states, which
            is worse on the small DiT.
        ridge: See `stepgraph.compiler.forecast.fit_in_closed_loop.FitRuns`.
        factors: Where the plan has LOWRANK sites.
        on_step: Called with (steps done, steps in all).

    Raises:
        PlanError: Nothing to fit, or plan, model and scheduler do not belong together.
    """
    traced = TracedModel(unwrapped(model))
    runs = FitRuns(samples, seed, guidance_scale, conditioning, target, False, ridge, on_step)
    return _fitted_plan(plan, traced, scheduler, terms, kinds, sites, runs, factors, "fit_forecast")


@checked
def residual_affine(
    plan: CachePlan,
    model: nn.Module,
    scheduler: Any,
    *,
    samples: int = 16,
    seed: int = 0,
    guidance_scale: float = 1.0,
    conditioning: Mapping[str, Any] | None = None,
    target: str = FULL,
    ridge: float = 1e-10,
    factors: Factors | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[CachePlan, Factors]:
    """A scale and a shift per channel on the reused residual of the block stack, for every skipped step: a * y1 + b.

    Args:
        plan: A plan that reuses `stack_residual`, such as MagCache's or TeaCache's.
        model: The plan's model.
        scheduler: The plan's scheduler; any deterministic one.
        samples: Sampling runs to fit on, all in one batch.
        seed: Of their noise.
        guidance_scale: Above 1, they run with classifier-free guidance.
        conditioning: As for `stepgraph.sample`, `samples` rows each; the model's example conditioning unless given.
        target: "full": the values in the full run; "own": those that the whole model has on the run's own states, which
            is worse on the small DiT.
        ridge: See `stepgraph.compiler.forecast.fit_in_closed_loop.FitRuns`.
        factors: The plan's, to which scale and shift are added.
        on_step: Called with (steps done, steps in all).

    Returns:
        The plan, bound to the factors that come with it; `stepgraph.compile` takes both. The maps serve all branches: a plan
        with two is refused.

    Raises:
        PlanError: `stack_residual` is nowhere reused, or plan, model and scheduler do not belong together.
    """
    if len(plan.header.branches) > 1:
        raise ArgumentError("coefficients per channel serve all branches of a plan; make one with guidance='batched'")
    runs = FitRuns(samples, seed, guidance_scale, conditioning, target, False, ridge, on_step)
    cells = _open_cells(plan, ("y1", CONSTANT), ["stack_residual"], None)
    _refuse_other_target(plan, cells, runs)
    fitted = fit_in_closed_loop(plan, TracedModel(unwrapped(model)), scheduler, cells, runs, factors, per_channel=True)
    affine = {
        f"{plan.sites[i].name}/{step}": branches[0].float() for (step, i), branches in sorted(fitted.coefficients.items())
    }
    whole = with_affine(factors, affine, plan)
    forecasts = {cell: Forecast(tuple(terms)) for cell, terms in cells.items()}
    record = {"by": "residual_affine", **_record(runs, cells, fitted)}
    header = {"seed": seed, "samples": samples, "factors": whole.digest}
    return with_cells(plan, dict.fromkeys(cells, FORECAST), forecasts, record, **header), whole


def _fitted_plan(
    plan: CachePlan,
    traced: TracedModel,
    scheduler: Any,
    terms: Sequence[str],
    kinds: Sequence[str] | None,
    sites: Sequence[str] | None,
    runs: FitRuns,
    factors: Factors | None,
    by: str,
) -> CachePlan:
    """The plan with fitted scalars."""
    cells = _open_cells(plan, terms, kinds, sites)
    _refuse_other_target(plan, cells, runs)
    fitted = fit_in_closed_loop(plan, traced, scheduler, cells, runs, factors)
    forecasts = {
        cell: Forecast(tuple(cells[cell]), tuple(tuple(row.tolist()) for row in rows))
        for cell, rows in fitted.coefficients.items()
    }
    asked = {} if by == "fit_whole_step" else chosen(kinds, sites)
    record = {"by": by, "terms": list(terms), **asked, **_record(runs, cells, fitted)}
    letters = dict.fromkeys(cells, FORECAST)
    return with_cells(plan, letters, forecasts, record, seed=runs.seed, samples=runs.samples)


def _open_cells(
    plan: CachePlan, terms: Sequence[str], kinds: Sequence[str] | None, sites: Sequence[str] | None
) -> dict[tuple[int, int], tuple[str, ...]]:
    """The REUSEs and FORECASTs of the chosen sites, with those of the terms that are stored by then.

    Raises:
        PlanError: There are none, or a term is unknown or not possible for a site.
    """
    whole = Forecast(tuple(terms), ((0.0,) * len(tuple(terms)),))
    cells = {}
    for step, i in find_cells(plan, (REUSE, FORECAST), kinds, sites):
        stored = sum(row[i] == COMPUTE for row in plan.rows[:step])
        if whole.inputs and plan.sites[i].kind != "output":
            raise ArgumentError(
                f"site {plan.sites[i].name}: only a forecast of `output` takes the model's input; terms: {terms}"
            )
        stored_terms = tuple(term for term in whole.terms if term == CONSTANT or int(term[1:]) <= stored)
        if not any(term.startswith("y") for term in stored_terms):
            raise ArgumentError(
                f"step {step}, site {plan.sites[i].name}: {stored} values are stored, too few for the terms {terms}"
            )
        cells[step, i] = stored_terms
    if not cells:
        raise PlanError("nothing to fit: the chosen sites are nowhere reused or forecast")
    return cells


def _refuse_other_target(plan: CachePlan, cells: Cells, runs: FitRuns) -> None:
    others = [plan.sites[i].name for _, i in cells if plan.sites[i].kind != "output"]
    if runs.target == STATE and others:
        raise ArgumentError(f"site {others[0]}: the target 'state' is for forecasts of `output`; expected 'full' or 'own'")


def _record(runs: FitRuns, cells: Cells, fitted: Fitted) -> dict[str, Any]:
    """How a fit was made and how near it came: per step, the largest relative L2 residual of its sites."""
    residuals: dict[str, float] = {}
    for (step, _), residual in sorted(fitted.residuals.items()):
        residuals[str(step)] = max(float(f"{residual:.4g}"), residuals.get(str(step), 0.0))
    most = max(len(terms) for terms in cells.values())
    shorter = {str(step): list(terms) for (step, _), terms in sorted(cells.items()) if len(terms) < most}
    return {
        "samples": runs.samples, "seed": runs.seed, "guidance_scale": runs.guidance_scale, "target": runs.target,
        "ridge": runs.ridge, "fallbacks": shorter, "residuals": residuals,
    }  # fmt: skip
