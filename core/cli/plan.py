"""`stepgraph plan`: make, import, export, resample, show and compare cache plans, and sweep a policy's knob."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stepgraph.cli.correct import plan_correct
from stepgraph.cli.options import (
    MODEL_HELP,
    AllowStochastic,
    Arguments,
    Device,
    Dtype,
    Json,
    PlanFile,
    ScheduleOption,
    SchedulerName,
    StepsOrSchedule,
    parse_arguments,
    parse_device,
    parse_dtype,
    progress_bar,
    reports_errors,
    show,
    show_plan,
)
from stepgraph.cli.router import plan_train_router
from stepgraph.cli.shipped import conditions, schedule_of
from stepgraph.cli.sweep import plan_sweep
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.entry.load_model import load_model, load_scheduler, load_to_plan
from stepgraph.compiler.entry.make_plan import make_plan, runs_model
from stepgraph.compiler.importers import EXPORTERS, IMPORTERS
from stepgraph.compiler.planning.import_plan import import_plan
from stepgraph.compiler.planning.list_policies import policies
from stepgraph.compiler.policies import POLICIES
from stepgraph.compiler.routers.router_settings import settings_of
from stepgraph.errors import ArgumentError
from stepgraph.files.whole_file import whole_file
from stepgraph.plan import CachePlan
from stepgraph.plan.plot import plot_diff
from stepgraph.plan.report import diff_plans
from stepgraph.schedule import counted_steps

plan_app = typer.Typer(
    no_args_is_help=True,
    help="Make, correct, import, export, resample, show and compare cache plans, and sweep a policy's knob.",
    rich_markup_mode=None,
)

# Click keeps the lines of a paragraph that begins with \b as they are.
MAKE_HELP = "\n\n".join(
    ["Make a plan with a policy.", "The policies and their arguments:", *(f"\b\n{record}" for record in policies().values())]
)


@plan_app.command(name="make", help=MAKE_HELP)
@reports_errors
def plan_make(
    policy: Annotated[str, typer.Option(help=f"{', '.join(POLICIES)}; each is described above")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "glyph-dit",
    stats: Annotated[Path | None, typer.Option(help="statistics of `stepgraph calibrate`; they bring the steps")] = None,
    steps: Annotated[int | None, typer.Option(help="number of inference steps; 50, or what the statistics have")] = None,
    scheduler: SchedulerName = None,
    guidance: Annotated[str, typer.Option(help="batched, separate or none")] = "batched",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    schedule: ScheduleOption = None,
    allow_stochastic: AllowStochastic = False,
    any_adapters: Annotated[
        bool, typer.Option("--any-adapters", help="declare the plan to hold for any LoRA of the model; said when one is on")
    ] = False,
    arg: Arguments = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the plan")] = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Make a plan with a policy."""
    arguments, checkpoint = parse_arguments(arg), out.with_name(f"{out.name}.unfinished")
    measured = CalibrationStats.load(stats) if stats is not None else None
    with progress_bar("loading and planning", as_json) as report:
        kind = parse_dtype(dtype)
        loaded = load_model(model, parse_device(device), kind) if runs_model(policy) else load_to_plan(model, kind)
        chosen = load_scheduler(model, scheduler)
        wish = parse_arguments(schedule)
        if measured is None:
            steps = counted_steps(wish, steps, chosen, 50)[1]
            wish = schedule_of(model, wish, steps)
            samples, guided = _runs_of(policy, arguments), True
        else:
            samples, guided = measured.header.samples or 1, measured.guidance_scale > 1
        cache_plan = make_plan(
            policy, measured, model=loaded, scheduler=chosen, steps=steps, guidance=guidance,
            allow_stochastic=allow_stochastic, checkpoint=checkpoint,
            on_step=lambda d, t: report("running the model", d, t), schedule=wish,
            conditioning=conditions(model, loaded, samples, guided), **arguments,
        )  # fmt: skip
    cache_plan = cache_plan.for_any_adapters() if any_adapters else cache_plan
    cache_plan.save(out)
    checkpoint.unlink(missing_ok=True)
    show_plan(cache_plan, as_json, f"wrote {out}")


def _runs_of(policy: str, arguments: Mapping[str, Any]) -> int:
    """The sampling runs that a policy takes of the model without statistics; what is no number it refuses itself."""
    if policy == "l2c":
        return settings_of(
            arguments.get("preset", "quick"), {k: v for k, v in arguments.items() if k == "pool" and v is not None}
        ).pool
    asked = arguments.get("samples", 16 if runs_model(policy) else 1)
    return asked if isinstance(asked, int) and asked > 0 else 1


@plan_app.command(name="policies")
@reports_errors
def plan_policies(as_json: Json = False) -> None:
    """List the policies: what each does, its paper, what it needs, and its arguments."""
    records = policies()
    if as_json:
        print(json.dumps({name: record.as_dict() for name, record in records.items()}))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print("\n\n".join(map(str, records.values())), markup=False)


@plan_app.command(name="import")
@reports_errors
def plan_import(
    file: Annotated[Path, typer.Argument(help="; ".join(importer.source for importer in IMPORTERS.values()))],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    steps: StepsOrSchedule = None,
    scheduler: SchedulerName = None,
    schedule: ScheduleOption = None,
    dtype: Dtype = "float32",
    allow_stochastic: AllowStochastic = False,
    arg: Arguments = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the plan")] = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Turn a published plan file, recognised by its content, into a plan for a model."""
    loaded = load_to_plan(model, parse_dtype(dtype))
    chosen = load_scheduler(model, scheduler)
    wish, options = parse_arguments(schedule), parse_arguments(arg)
    count = counted_steps(wish, steps, chosen, 50)[1]
    cache_plan = import_plan(file, loaded, chosen, steps=count, schedule=wish, allow_stochastic=allow_stochastic, **options)
    cache_plan.save(out)
    show_plan(cache_plan, as_json, f"wrote {out}")


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
        raise ArgumentError(f"unknown format {form!r}; known: {', '.join(EXPORTERS)}")
    exported = EXPORTERS[form](CachePlan.load(plan))
    with whole_file(out) as partial:
        partial.write_text(json.dumps(exported), encoding="utf-8")
    show({"written": str(out)}, as_json)


@plan_app.command(name="resample")
@reports_errors
def plan_resample(
    plan: PlanFile,
    steps: Annotated[int, typer.Option(help="the new number of inference steps")],
    model: Annotated[
        str | None, typer.Option(help="take the new timesteps from the scheduler beside this model; else they are interpolated")
    ] = None,
    scheduler: SchedulerName = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the plan")] = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Stretch a plan's pattern to another number of steps."""
    loaded = CachePlan.load(plan)
    if model is None and scheduler is not None:
        raise ArgumentError(f"--scheduler {scheduler} needs --model too, whose configuration of it is used")
    chosen = load_scheduler(model, scheduler) if model is not None else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        resampled = loaded.resample(steps, chosen)
    notes = [str(warning.message) for warning in caught if warning.category is UserWarning]
    if chosen is None and resampled is not loaded:
        notes.append("its timesteps are interpolated, so sampling refuses it unless the scheduler's agree; pass --model")
    resampled.save(out)
    show_plan(resampled, as_json, f"wrote {out}", notes)


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


@plan_app.command(name="diff")
@reports_errors
def plan_diff(
    first: PlanFile,
    second: PlanFile,
    plot: Annotated[Path | None, typer.Option(help="write both heat maps, and where they differ, to this PNG")] = None,
    as_json: Json = False,
) -> None:
    """Compare two plans; the exit status is 0 either way."""
    plans = CachePlan.load(first), CachePlan.load(second)
    difference = diff_plans(*plans)
    if plot is not None:
        plot_diff(*plans, plot)
    if as_json:
        print(json.dumps(difference))
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, (before, after) in difference["header"].items():
        console.print(f"{name}: {_brief(before)} -> {_brief(after)}", markup=False)
    for label in ("only_in_first", "only_in_second"):
        for site in difference[label]:
            console.print(f"{label.replace('_', ' ')}: {site}", markup=False)
    for site, (before, after) in difference["sites"].items():
        console.print(f"{site}\n  - {before}\n  + {after}", markup=False)
    steps = " and ".join(str(plan.steps) for plan in plans)
    pairs = difference["pairs_changed"]
    console.print(f"{pairs} (step, site) pairs differ" if pairs is not None else f"{steps} evaluations: steps are not compared")
    if plot is not None:
        console.print(f"wrote {plot}", markup=False)


def _brief(value: object) -> str:
    """A header field in one line."""
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"{value[0]}, {value[1]}, ..., {value[-1]} ({len(value)} in all)"
    return str(value)


plan_app.command(name="sweep")(plan_sweep)
plan_app.command(name="train-router")(plan_train_router)
plan_app.command(name="correct")(plan_correct)
