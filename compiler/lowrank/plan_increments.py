"""Increments on the trajectories of a corrected plan: where its factors will be used, not where the full model goes."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepgraph.compiler.calibration.trajectory import Trajectory
from stepgraph.compiler.lowrank.increments import Target, Watcher
from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.errors import ArgumentError, PlanError
from stepgraph.plan import COMPUTE, LOWRANK, CachePlan
from stepgraph.plan.corrections import Forecast
from stepgraph.plan.factors import Factors
from stepgraph.plan.refuse_other import refuse_other_model, refuse_other_schedule
from stepgraph.scheduler import prepare_scheduler

LAST = Forecast(("y1",), ((1.0,),))


class PlanRuns:
    """A corrected plan, bound to its factors and compiled, whose states the full model is evaluated on.

    Attributes:
        plan: As it was bound.
        corrected: Indices of its LOWRANK sites.
        ages: How many stored values the increments of one site are taken around at most.
    """

    def __init__(
        self,
        plan: CachePlan,
        factors: Factors | None,
        traced: TracedModel,
        scheduler: Any,
        inputs: Mapping[str, Tensor],
        guidance_scale: float,
    ) -> None:
        refuse_other_model(plan.header, traced.model)
        prepared = prepare_scheduler(scheduler, plan.header.steps, schedule=plan.header.schedule)
        refuse_other_schedule(plan.header, prepared, "the given scheduler")
        if (plan.header.guidance == "separate" and guidance_scale <= 1) or (
            plan.header.guidance == "none" and guidance_scale > 1
        ):
            raise ArgumentError(
                f"the plan is for guidance {plan.header.guidance!r}; the guidance_scale {guidance_scale:g} does not go with it"
            )
        self.corrected = frozenset(i for row in plan.rows for i, action in enumerate(row) if action == LOWRANK)
        if not self.corrected:
            raise PlanError(
                "the plan has no LOWRANK site whose increments could be measured; correct it with stepgraph.lowrank "
                "(`stepgraph plan correct --lowrank`)"
            )
        around = [plan_forecast for (step, i), plan_forecast in plan.forecasts.items() if plan.rows[step][i] == LOWRANK]
        self.ages = max((age for forecast in around for age in forecast.ages), default=1)
        self.executable = compile_plan(traced.model, plan, inputs, CompileConfig("eager", exact=True), factors, traced)
        self.plan, self.scheduler, self.scale = self.executable.plan, scheduler, guidance_scale

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the plan and the factors it is bound to."""
        return hashlib.sha256(self.plan.to_json().encode()).hexdigest()[:16]


class PlanWatcher(Watcher):
    """Evaluates the full model on given states and hands the increments at a plan's LOWRANK steps to the sums.

    An increment is the difference from what the plan has stored of its site by then: the value at its last COMPUTE, or the
    forecast that the plan takes the increment around.
    """

    def __init__(self, model: nn.Module, marked: MarkedGraph, sums: Mapping[Target, Any], runs: PlanRuns) -> None:
        super().__init__(model, marked, sums, ())
        self.runs, self.plan, self.ages = runs, runs.plan, runs.ages
        sites: list[int] = []
        for target in self.sums:
            # A whole target has one value, and its outputs are of the same site.
            sites += [*target.sites, *(target.sites[0] for _ in target.outputs)]
        self.sites = tuple(sites)

    def begin(self) -> None:
        """A new sampling run."""
        self.history: dict[tuple[int, int], list[Tensor]] = {}

    @torch.no_grad()
    def run(self, noise: Tensor, conditioning: Mapping[str, Any], report: Callable[[int, int], None] | None = None) -> None:
        """One sampling run of the plan from noise [1, C, ...] in the model's dtype.

        Args:
            noise: Standard normal.
            conditioning: As for `stepgraph.sample`.
            report: Called with (steps done, steps in all).
        """
        runs, session, steps = self.runs, self.runs.executable.session(), self.plan.steps
        trajectory = Trajectory(self.plan.header, self.observed, runs.scheduler, noise, runs.scale, conditioning)
        for step in range(steps):
            calls = trajectory.inputs()
            for branch, inputs in enumerate(calls):
                self.watch(step, branch, inputs)
            trajectory.advance([session(return_dict=False, **inputs)[0] for inputs in calls])
            if report is not None:
                report(step + 1, steps)

    def watch(self, step: int, branch: int, inputs: Mapping[str, Any]) -> None:
        """The full model on a branch's inputs at a step; the sums grow by the increments of the sites corrected there."""
        _, values = self.evaluate(inputs)
        increments = iter([self._increment(step, branch, index, value) for index, value in enumerate(values)])
        for target, sums in self.sums.items():
            xs = [next(increments) for _ in target.values]
            ys = {path: next(increments) for path in target.outputs}
            present = [x for x in xs if x is not None]
            if present:
                sums.add(present, {path: y for path, y in ys.items() if y is not None})

    def _increment(self, step: int, branch: int, value_index: int, value: Tensor) -> Tensor | None:
        """[rows, C] float32 where the value's site is corrected; where it is computed, the value is kept."""
        site, history = self.sites[value_index], self.history.setdefault((branch, value_index), [])
        action = self.plan.rows[step][site]
        if action == COMPUTE:
            history.insert(0, value.to(torch.float32))
            del history[self.ages :]
        if action != LOWRANK:
            return None
        forecast = self.plan.forecasts.get((step, site), LAST)
        row = forecast.coefficients[branch if len(forecast.coefficients) > 1 else 0]
        stored = sum(c * history[age - 1] for age, c in zip(forecast.ages, row, strict=True))
        return (value.to(torch.float32) - stored).flatten(0, -2)
