"""`stepgraph plan correct`: forecasts and low-rank increments in place of reused values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from stepgraph.cli.options import (
    MODEL_HELP,
    Device,
    Dtype,
    FactorsFile,
    Json,
    PlanFile,
    SchedulerName,
    Seed,
    factors_beside,
    load_factors,
    parse_device,
    parse_dtype,
    progress_bar,
    refuse_strays,
    reports_errors,
    show_plan,
)
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.forecast.correct_plan import forecast, lowrank
from stepgraph.compiler.forecast.fit_forecasts import TARGETS, fit_forecast, fit_whole_step, residual_affine
from stepgraph.compiler.forecast.forecasts import RULES
from stepgraph.errors import ArgumentError
from stepgraph.files.whole_file import writable_folder
from stepgraph.plan import CachePlan
from stepgraph.plan.factors import Factors

FITS: dict[str, Callable[..., Any]] = {"whole-step": fit_whole_step, "sites": fit_forecast, "residual-affine": residual_affine}

RUNS = ("model", "term", "target", "samples", "seed", "guidance", "scheduler", "device", "dtype")
BELONGS = {
    "around": ("--lowrank", ("--lowrank",)),
    "order": ("--forecast or --around", ("--forecast", "--around")),
    **dict.fromkeys(RUNS, ("--fit", ("--fit",))),
}


@reports_errors
def plan_correct(
    context: typer.Context,
    plan: PlanFile,
    model: Annotated[str | None, typer.Argument(help=f"needed for --fit: {MODEL_HELP}")] = None,
    by_rule: Annotated[str | None, typer.Option("--forecast", help=f"a formula: {', '.join(RULES)}")] = None,
    by_fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            help="whole-step (scalars for each skipped step), sites (for each reused value) or residual-affine (a scale "
            "and a shift per channel on a reused stack_residual)",
        ),
    ] = None,
    by_increments: Annotated[bool, typer.Option("--lowrank", help="LOWRANK where modules are reused")] = False,
    order: Annotated[int, typer.Option(help="of --forecast or --around, 0 (the last value) to 4")] = 1,
    around: Annotated[str | None, typer.Option(help="with --lowrank: the formula that increments are taken around")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="only sites of this kind; may be given again")] = None,
    site: Annotated[list[str] | None, typer.Option(help="only this site; may be given again")] = None,
    term: Annotated[list[str] | None, typer.Option(help="with --fit: what is combined, such as y1 or x0; once each")] = None,
    target: Annotated[str | None, typer.Option(help=f"with --fit: {', '.join(TARGETS)}")] = None,
    samples: Annotated[int, typer.Option(help="with --fit: sampling runs to fit on")] = 16,
    seed: Seed = 0,
    factors: FactorsFile = None,
    guidance: Annotated[float, typer.Option(help="with --fit: classifier-free guidance scale of the runs; 1 for none")] = 1.0,
    scheduler: SchedulerName = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the plan")] = Path("corrected.json"),
    as_json: Json = False,
) -> None:
    """Put something better in place of what a plan reuses: a forecast by formula, a fitted one, or low-rank increments."""
    asked = [name for name, value in (("--forecast", by_rule), ("--fit", by_fit), ("--lowrank", by_increments)) if value]
    if len(asked) != 1:
        raise ArgumentError(f"give one of --forecast, --fit and --lowrank; got {' and '.join(asked) or 'none'}")
    refuse_strays(context, BELONGS, [*asked, *(["--around"] if around is not None else [])], asked[0])
    loaded, corrected_factors = CachePlan.load(plan), load_factors(plan, factors)
    writable_folder(out.resolve().parent)
    chosen: dict[str, Any] = {"kinds": kind or None, "sites": site or None}
    if by_rule is not None:
        corrected = forecast(loaded, by_rule, order, **chosen)
    elif by_fit is None:
        corrected = lowrank(loaded, around=around, order=order if around is not None else None, **chosen)
    else:
        options: dict[str, Any] = {"terms": term or None, "target": target}
        settings = {name: value for name, value in options.items() if value is not None}
        settings |= {"samples": samples, "seed": seed, "guidance_scale": guidance, "factors": corrected_factors}
        corrected, corrected_factors = _fit(loaded, model, by_fit, scheduler, device, dtype, settings, chosen, as_json)
    if corrected_factors is not None:
        corrected_factors.save(factors_beside(out))
    corrected.save(out)
    note = f"wrote {out}: {json.dumps(corrected.header.arguments['corrections'][-1])}"
    show_plan(corrected, as_json, note)


def _fit(
    plan: CachePlan,
    model: str | None,
    kind: str,
    scheduler: str | None,
    device: str,
    dtype: str,
    settings: dict[str, Any],
    chosen: dict[str, Any],
    as_json: bool,
) -> tuple[CachePlan, Factors | None]:
    """Run the model: the corrected plan and its factors."""
    if kind not in FITS:
        raise ArgumentError(f"unknown fit {kind!r}; known: {', '.join(FITS)}")
    if kind != "sites" and any(chosen.values()):
        raise ArgumentError(f"--fit {kind} has its one site; --kind and --site go with --fit sites")
    if kind == "residual-affine" and "terms" in settings:
        raise ArgumentError("--fit residual-affine combines y1 and a constant; --term goes with the other fits")
    if model is None:
        raise ArgumentError("--fit runs the model: name it behind the plan, as in `plan correct PLAN glyph-dit --fit ...`")
    with progress_bar("loading", as_json) as report:
        loaded = load_model(model, parse_device(device), parse_dtype(dtype))
        arguments = {**settings, **(chosen if kind == "sites" else {})}
        chosen_scheduler = load_scheduler(model, scheduler)
        fitted = FITS[kind](plan, loaded, chosen_scheduler, on_step=lambda d, t: report("fitting", d, t), **arguments)
    return fitted if isinstance(fitted, tuple) else (fitted, settings["factors"])
