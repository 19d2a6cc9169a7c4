"""stepgraph: compile a diffusion transformer and a cache plan into a static program for one whole sampling run.

In four lines:

    import stepgraph as sg

    plan = sg.make_plan("interval", model=model, scheduler=scheduler, steps=50, every=2)
    exe = sg.compile(model, plan, sg.example_inputs(model))
    exe.attach(pipe)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepgraph.checked import checked
from stepgraph.compiler.calibration.calibrate import calibrate
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.entry.accelerate import accelerate
from stepgraph.compiler.entry.load_artifact import load_artifact
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.entry.sweep import sweep
from stepgraph.compiler.forecast.correct_plan import forecast, lowrank
from stepgraph.compiler.forecast.fit_forecasts import fit_forecast, fit_whole_step, residual_affine
from stepgraph.compiler.lowrank.covariances import Covariances, measure_covariances
from stepgraph.compiler.lowrank.factorize import factorize
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.planning.import_plan import import_plan
from stepgraph.compiler.planning.list_policies import policies
from stepgraph.compiler.routers.router import Router
from stepgraph.compiler.routers.router_settings import RouterSettings
from stepgraph.compiler.routers.train_router import train_router
from stepgraph.config import CompileConfig
from stepgraph.errors import CompileError, PlanError, StepgraphError, TraceError
from stepgraph.plan import Action, CachePlan, PlanHeader, Site
from stepgraph.plan.factors import Factors
from stepgraph.runtime.attach.watch_call import WatchedCall, watch
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.sampling.sample import sample
from stepgraph.runtime.session.session import Session

__version__ = "0.1.0"


@checked
def compile(
    model: nn.Module,
    plan: CachePlan,
    example_inputs: Mapping[str, Any],
    backend: str = "inductor",
    exact: bool = False,
    factors: Factors | None = None,
    **options: Any,
) -> Executable:
    """Compile a plan for a model.

    Args:
        model: In evaluation mode; its weights are used by reference and not copied.
        plan: Made for this model; the scheduler is checked when the executable is sampled with or attached.
        example_inputs: The model's forward arguments. Other batch sizes compile when they are first met.
        backend: "inductor" or "eager".
        exact: Keep every operation, so that results are bit-equal to the eager model; needs backend="eager".
        factors: What LOWRANK sites are corrected with (`stepgraph.factorize`).
        **options: Further fields of `CompileConfig`, such as `hoist_limit_mb=64`.

    Raises:
        PlanError: The plan does not fit the model or the inputs.
        TraceError: The model's forward cannot be a static graph.
        CompileError: Something else stands in the way; the message says what.
    """
    return compile_plan(model, plan, example_inputs, CompileConfig(backend, exact, **options), factors)


@checked
def load(
    path: str | Path, model: nn.Module | None = None, *, device: str | torch.device | None = None, verify: bool | None = None
) -> Executable:
    """Read an artifact that `Executable.save` wrote, and compile it.

    Nothing in an artifact is run: it is data, checked against the hashes that it states (docs/security.md).

    Args:
        path: The folder or zip file.
        model: The model that it was made for, compared by fingerprint. An artifact that brings its weights needs none.
        device: Where weights that the artifact brings go; the CPU unless given. A model stays where it is.
        verify: Compare the first step with the eager model. None: where the artifact was made with another version of
            stepgraph, torch or diffusers, which is warned of.

    Raises:
        PlanError: The artifact is missing, damaged, of another format version, or for another model.
        CompileError: It cannot be compiled here, or its first step is not the model's.
    """
    return load_artifact(path, model, device=device, verify=verify)


__all__ = [
    "Action", "CachePlan", "CalibrationStats", "CompileConfig", "CompileError", "Covariances", "Executable", "Factors",
    "PlanError", "PlanHeader", "Router", "RouterSettings", "Session", "Site", "StepgraphError", "TraceError", "WatchedCall",
    "accelerate", "calibrate", "compile", "example_inputs", "factorize", "fit_forecast", "fit_whole_step", "forecast",
    "import_plan", "load", "lowrank", "make_plan", "measure_covariances", "policies", "residual_affine", "sample", "sweep",
    "train_router", "watch",
]  # fmt: skip
