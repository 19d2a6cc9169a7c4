"""What a policy may ask of the model: policies themselves see no graphs, and get these as functions, by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepgraph.compiler.calibration.calibrate import calibrate_traced, digest
from stepgraph.compiler.calibration.rates import Metric
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.forecast.fit_forecasts import fit_traced
from stepgraph.compiler.forecast.fit_in_closed_loop import STATE, FitRuns
from stepgraph.compiler.marking.describe import input_shapes
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.routers.router import Router
from stepgraph.compiler.routers.router_settings import settings_of
from stepgraph.compiler.routers.train_router import train_traced
from stepgraph.errors import ArgumentError, MismatchError
from stepgraph.plan import CachePlan, PlanHeader, Site

# Parameters of policies that are filled in with the functions of these names; users do not pass them.
MODEL_SERVICES = ("again", "fit", "train")


@dataclass(frozen=True)
class ModelServices:
    """The model, and how it was or is to be measured.

    Attributes:
        header: What the plan is for.
        stats: Its calibration, where there is one.
        traced: The model, where it was given, with the graphs that were made of it.
        scheduler: Where it was given.
        conditioning: What the calibration was given; so are the next three.
        inputs: The forward's arguments, where the model's usual shapes are not meant.
        metrics: Rates of one's own.
        allow_stochastic: Whether the sampler may add noise.
        checkpoint: Where unfinished runs are kept.
        on_step: Called with (done, in all).
    """

    header: PlanHeader
    stats: CalibrationStats | None
    traced: TracedModel | None
    scheduler: Any
    conditioning: Mapping[str, torch.Tensor] | None = None
    inputs: Mapping[str, torch.Tensor] | None = None
    metrics: Mapping[str, Metric] | None = None
    allow_stochastic: bool = False
    checkpoint: str | Path | None = None
    on_step: Callable[[int, int], None] | None = None

    def again(self, reused: torch.Tensor) -> CalibrationStats:
        """The calibration once more, its rates measured under provisional reuses [T, sites] (InvarDiff's phase 2).

        Raises:
            PlanError: The model or scheduler is missing, or the conditioning is not that of the calibration.
        """
        if self.stats is None or self.traced is None or self.scheduler is None:
            raise ArgumentError("phase 2 measures the model once more: pass model= and scheduler=, or phase2=False")
        if digest(self.conditioning) != self.stats.conditioning:
            raise MismatchError("the statistics were measured with other conditioning; pass the same to make_plan")
        inputs = self.inputs or self.traced.example_inputs(1, self.conditioning)
        shapes = input_shapes(inputs, self.traced.family.unbatched)
        if shapes != self.header.shapes:
            raise MismatchError(
                f"the statistics are of inputs {dict(self.header.shapes)}, phase 2 would measure {shapes}; pass example_inputs "
                f"of these shapes to make_plan"
            )
        return calibrate_traced(
            self.traced, self.scheduler, steps=self.header.steps, samples=self.header.samples or 1,
            seed=self.header.seed or 0, guidance_scale=self.stats.guidance_scale, conditioning=self.conditioning,
            inputs=self.inputs, provisional=reused, eta=self.stats.eta, metrics=self.metrics, channels=False,
            allow_stochastic=self.allow_stochastic, checkpoint=self.checkpoint, on_step=self.on_step,
            schedule=self.header.schedule,
        )  # fmt: skip

    def fit(self, sites: Sequence[Site], actions: Mapping[str, str], **settings: Any) -> CachePlan:
        """A plan whose skipped steps are fitted combinations (`stepgraph.fit_whole_step`).

        Raises:
            PlanError: The model or scheduler is missing.
        """
        if self.traced is None or self.scheduler is None:
            raise ArgumentError("the whole-step rule is fitted on the model: pass model= and scheduler=")
        plan = CachePlan.build(self.header, sites, actions)
        runs = FitRuns(conditioning=self.conditioning, target=STATE, on_step=self.on_step, **settings)
        return fit_traced(plan, self.traced, self.scheduler, runs)

    def train(self, file: str | None, preset: str, changes: Mapping[str, Any]) -> Router:
        """Routers from a file, or trained on the model (Learning-to-Cache).

        Raises:
            PlanError: The file belongs to something else, or there is no model to train on.
        """
        if file is not None:
            if not isinstance(file, (str, Path)):
                raise ArgumentError(f"router is {file!r}; expected the name of a file of trained routers")
            router = Router.load(file)
            router.refuse_other(self.header, str(file), None if self.traced is None else self.traced.model)
            return router
        if self.traced is None or self.scheduler is None:
            raise ArgumentError(
                "routers are trained on the model: pass model= and scheduler=, or router= with a file of trained ones"
            )
        settings = settings_of(preset, changes)
        return train_traced(
            self.traced, self.scheduler, steps=self.header.steps, settings=settings, checkpoint=self.checkpoint,
            on_step=self.on_step, conditioning=self.conditioning, schedule=self.header.schedule, timestep=self.header.timestep,
        )  # fmt: skip
