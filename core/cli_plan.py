"""`stepgraph plan`: make, import, export, show and compare cache plans."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stepgraph.cli_common import (
    MODEL_HELP,
    Arguments,
    Dtype,
    Json,
    PlanFile,
    SchedulerName,
    Steps,
    parse_arguments,
    parse_dtype,
    progress_bar,
    reports_errors,
    show,
)
from stepgraph.compiler.import_plan import import_plan
from stepgraph.compiler.importers import EXPORTERS, IMPORTERS
from stepgraph.compiler.make_plan import make_plan, runs_model
from stepgraph.compiler.models.load import load_model, load_scheduler, load_to_plan
from stepgraph.compiler.policies import POLICIES
from stepgraph.compiler.stats import CalibrationStats
from stepgraph.files import whole_file
from stepgraph.plan import CachePlan, PlanError
from stepgraph.plan_report import diff_plans

plan_app = typer.Typer(no_args_is_help=True, help="Make, import, export, show and compare cache plans.")


@plan_app.command(name="make")
@reports_errors
def plan_make(
    policy: Annotated[str, typer.Argument(help=f"{', '.join(POLICIES)}")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "glyph-dit",
    stats: Annotated[Path | None, typer.Option(help="statistics of `stepgraph calibrate`; they bring the steps")] = None,
    steps: Annotated[int | None, typer.Option(help="number of inference steps; 50, or what the statistics have")] = None,
    scheduler: SchedulerName = None,
    guidance: Annotated[str, typer.Option(help="batched, separate or none")] = "batched",
    dtype: Dtype = "float32",
    arg: Arguments = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the plan")] = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Make a plan with a policy."""
    arguments = parse_arguments(arg)
    measured = CalibrationStats.load(stats) if stats is not None else None
    with progress_bar("loading and planning", as_json):
        kind = parse_dtype(dtype)
        loaded = load_model(model, "cpu", kind) if runs_model(policy) else load_to_plan(model, kind)
        chosen = load_scheduler(model, scheduler)
        steps = 50 if steps is None and measured is None else steps
        made = make_plan(policy, measured, model=loaded, scheduler=chosen, steps=steps, guidance=guidance, **arguments)
    made.save(out)
    show_plan(made, as_json, f"wrote {out}")


@plan_app.command(name="import")
@reports_errors
def plan_import(
    file: Annotated[Path, typer.Argument(help="; ".join(importer.source for importer in IMPORTERS.values()))],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    steps: Steps = 50,
    scheduler: SchedulerName = None,
    dtype: Dtype = "float32",
    arg: Arguments = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the plan")] = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Turn a published plan file, recognised by its content, into a plan for a model."""
    loaded = load_to_plan(model, parse_dtype(dtype))
    chosen = load_scheduler(model, scheduler)
    made = import_plan(file, loaded, chosen, steps=steps, **parse_arguments(arg))
    made.save(out)
    show_plan(made, as_json, f"wrote {out}")


@plan_app.command(name="export")
@reports_errors
def plan_export(
    plan: PlanFile,
    form: Annotated[str, typer.Option("--format", help=", ".join(EXPORTERS))],
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write it")],
    as_json: Json = False,
) -> None:
    """Write a plan in a published format."""
    if form not in EXPORTERS:
        raise PlanError(f"unknown format {form!r}; known: {', '.join(EXPORTERS)}")
    exported = EXPORTERS[form](CachePlan.load(plan))
    with whole_file(out) as partial:
        partial.write_text(json.dumps(exported), encoding="utf-8")
    show({"written": str(out)}, as_json)


@plan_app.command(name="show")
@reports_errors
def plan_show(
    plan: PlanFile,
    plot: Annotated[Path | None, typer.Option(help="write the heat map to this PNG")] = None,
    as_json: Json = False,
) -> None:
    """Show what a plan does, and draw its heat map."""
    loaded = CachePlan.load(plan)
    if plot is not None:
        loaded.plot(plot)
    show_plan(loaded, as_json, f"wrote {plot}" if plot else None)


def show_plan(plan: CachePlan, as_json: bool, note: str | None) -> None:
    """A plan's summary."""
    if as_json:
        print(json.dumps(plan.summary().as_dict()))
        return
    header, console = plan.header, Console(highlight=False, soft_wrap=True)
    console.print(f"{header.model} {header.fingerprint}, {header.dtype}, {header.scheduler} {header.steps} steps", markup=False)
    console.print(str(plan.summary()), markup=False)
    if note:
        console.print(note, markup=False)


@plan_app.command(name="diff")
@reports_errors
def plan_diff(first: PlanFile, second: PlanFile, as_json: Json = False) -> None:
    """Compare two plans; the exit status is 0 either way."""
    difference = diff_plans(CachePlan.load(first), CachePlan.load(second))
    if as_json:
        print(json.dumps(difference))
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, (before, after) in difference["header"].items():
        console.print(f"{name}: {before} -> {after}", markup=False)
    for label in ("only_in_first", "only_in_second"):
        for site in difference[label]:
            console.print(f"{label.replace('_', ' ')}: {site}", markup=False)
    for site, (before, after) in difference["sites"].items():
        console.print(f"{site}\n  - {before}\n  + {after}", markup=False)
    console.print(f"{difference['pairs_changed']} (step, site) pairs differ")
