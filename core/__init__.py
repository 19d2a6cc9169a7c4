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

from stepgraph.compiler.accelerate import accelerate
from stepgraph.compiler.calibrate import calibrate
from stepgraph.compiler.correct import forecast, lowrank
from stepgraph.compiler.covariances import Covariances, measure_covariances
from stepgraph.compiler.describe import example_inputs
from stepgraph.compiler.factorize import factorize
from stepgraph.compiler.factors import Factors
from stepgraph.compiler.fit_forecasts import fit_forecast, fit_whole_step, residual_affine
from stepgraph.compiler.import_plan import import_plan
from stepgraph.compiler.list_policies import policies
from stepgraph.compiler.load_artifact import load_artifact
from stepgraph.compiler.make_plan import make_plan
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.router import Router
from stepgraph.compiler.router_settings import RouterSettings
from stepgraph.compiler.stats import CalibrationStats
from stepgraph.compiler.sweep import sweep
from stepgraph.compiler.trace import TraceError
from stepgraph.compiler.train_router import train_router
from stepgraph.config import CompileConfig, CompileError
from stepgraph.plan import Action, CachePlan, PlanError, PlanHeader, Site
from stepgraph.runtime.executable import Executable, Session
from stepgraph.runtime.sampler import sample

__version__ = "0.1.0"


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
    "PlanError", "PlanHeader", "Router", "RouterSettings", "Session", "Site", "TraceError", "accelerate", "calibrate",
    "compile", "example_inputs", "factorize", "fit_forecast", "fit_whole_step", "forecast", "import_plan", "load",
    "lowrank", "make_plan", "measure_covariances", "policies", "residual_affine", "sample", "sweep", "train_router",
]  # fmt: skip
