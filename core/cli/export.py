"""`stepgraph export`: a compiled plan as files that need no stepgraph."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from stepgraph.cli.options import (
    Batch,
    Device,
    Dtype,
    FactorsFile,
    Json,
    Model,
    SchedulerName,
    load_factors,
    parse_device,
    parse_dtype,
    progress_bar,
    reports_errors,
    show,
)
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.marking.describe import planned_inputs
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.fingerprint import model_dtype
from stepgraph.plan import CachePlan
from stepgraph.runtime.export.export import FORMATS, refuse_target
from stepgraph.schedule import timestep_of
from stepgraph.scheduler import prepare_scheduler


@reports_errors
def export_command(
    model: Model,
    plan: Annotated[Path, typer.Option(help="the plan file")],
    format: Annotated[str, typer.Option(help=f"{', '.join(FORMATS)}")] = "pt2",
    out: Annotated[Path, typer.Option(help="folder for the export; new, empty, or with --force an earlier export")] = Path(
        "export"
    ),
    batch: Batch = 2,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    factors: FactorsFile = None,
    scheduler: SchedulerName = None,
    portable: Annotated[bool, typer.Option(help="fused operations as plain torch; else as stepgraph's own")] = True,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export")] = False,
    as_json: Json = False,
) -> None:
    """Compile a plan and write it as torch.export, AOTInductor or ONNX programs with a runner, or as graphs to look at."""
    refuse_target(out, format, force)
    cache_plan = CachePlan.load(plan)
    with progress_bar("loading", as_json) as report:
        report("loading", 0, 3)
        loaded = load_model(model, parse_device(device), parse_dtype(dtype))
        chosen = load_scheduler(model, scheduler)
        traced = TracedModel(loaded)
        inputs = planned_inputs(loaded, traced.family, cache_plan.header, batch)
        # Samplers pass their timesteps in a dtype of their own.
        header = cache_plan.header
        prepared = prepare_scheduler(chosen, header.steps, torch.device(device), header.schedule)
        timesteps = (header.timestep or timestep_of(loaded))(prepared.timesteps, model_dtype(loaded))
        inputs["timestep"] = inputs["timestep"].to(timesteps.dtype)
        report("compiling", 1, 3)
        executable = compile_plan(loaded, cache_plan, inputs, CompileConfig("eager"), load_factors(plan, factors), traced)
        report("exporting", 2, 3)
        started = time.perf_counter()
        folder = executable.export(out, format, scheduler=chosen, portable=portable, force=force)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    facts = {
        "written": str(folder),
        "format": format,
        "variants": len(executable.default.variants),
        "seconds": time.perf_counter() - started,
        "bytes": {str(path.relative_to(folder)): path.stat().st_size for path in files},
    }
    show(facts, as_json)
