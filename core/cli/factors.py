"""`stepgraph factors`: make low-rank factors, show them, and compare ranks on runs they were not made from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from stepgraph.cli.options import (
    Device,
    Dtype,
    FactorsFile,
    Json,
    Model,
    SchedulerName,
    Seed,
    Steps,
    load_factors,
    parse_device,
    parse_dtype,
    progress_bar,
    refuse_strays,
    reports_errors,
    show,
)
from stepgraph.compiler.calibration.calibrate import calibrate_traced
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.lowrank.covariances import Covariances, covariances_traced
from stepgraph.compiler.lowrank.factorize import Source, factors_traced, source_kind
from stepgraph.compiler.lowrank.map_errors import mean_error
from stepgraph.compiler.lowrank.rank_report import report_traced
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.errors import ArgumentError
from stepgraph.files.whole_file import writable_folder
from stepgraph.plan import CachePlan
from stepgraph.plan.factors import METHODS, Factors, place_of

factors_app = typer.Typer(
    no_args_is_help=True, help="Make low-rank factors of linear maps, show them, and compare ranks.", rich_markup_mode=None
)

Method = Annotated[str, typer.Option(help=f"{', '.join(METHODS)}; cov minimises the error on measured increments")]
Scale = Annotated[str | None, typer.Option(help="side that ca and cd scale: in, out or both; both unless given")]
PlanToRun = Annotated[
    Path | None, typer.Option("--plan", help="measure on the runs of this corrected plan, not on those of the full model")
]
Kinds = Annotated[str | None, typer.Option(help="kinds of sites, such as attn,ff; all module sites unless given")]
Samples = Annotated[int, typer.Option(min=1, help="sampling runs to measure, one sample each")]
Guidance = Annotated[float, typer.Option(help="classifier-free guidance scale of the runs; 1 for none")]
Period = Annotated[str | None, typer.Option(help="every how many steps a plan computes, 2 unless given; several as 2,3")]
Shrinkage = Annotated[float | None, typer.Option(help="of the covariances towards the identity, 0..1; estimated unless given")]
MemoryGb = Annotated[float | None, typer.Option(help="most gigabytes for covariances; more make several passes")]
Sketch = Annotated[int | None, typer.Option(help="keep this many directions, at least twice the rank, not whole covariances")]
Stats = Annotated[Path | None, typer.Option(help="statistics of `stepgraph calibrate` for ca and cd; else they are measured")]

COVARIANCES = ("the methods cov and whole", ("cov", "whole"))
# Parameter -> what it goes with, in words and by name.
BELONGS = {"scale": ("the methods ca and cd", ("ca", "cd")), "shrinkage": COVARIANCES}
MEASURED = {
    **dict.fromkeys(("period", "plan", "factors", "memory_gb", "sketch"), COVARIANCES),
    **dict.fromkeys(("steps", "samples", "seed", "guidance", "scheduler"), ("sampling runs", ("runs",))),
}


@factors_app.command(name="make")
@reports_errors
def factors_make(
    context: typer.Context,
    model: Model,
    method: Method = "cov",
    rank: Annotated[int | None, typer.Option(help="rank of every map; 32 unless there is a budget")] = None,
    budget: Annotated[float | None, typer.Option(help="or the share of the maps' own MACs that all may cost: 0.25")] = None,
    scale: Scale = None,
    kinds: Kinds = None,
    steps: Annotated[int | None, typer.Option(help="number of inference steps; 50, or the plan's, unless given")] = None,
    samples: Samples = 8,
    seed: Seed = 0,
    guidance: Guidance = 1.0,
    period: Period = None,
    plan: PlanToRun = None,
    factors: FactorsFile = None,
    shrinkage: Shrinkage = None,
    memory_gb: MemoryGb = None,
    sketch: Sketch = None,
    stats: Stats = None,
    scheduler: SchedulerName = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the factors")] = Path("factors.safetensors"),
    as_json: Json = False,
) -> None:
    """Measure sampling runs where the method asks for it, and factorise every linear map inside module sites.

    With --plan the runs are those of a plan with LOWRANK sites under its factors (--factors): one more round of factors, fitted
    where they are used.
    """
    _refuse_strays(context, method, stats, MEASURED)
    writable_folder(out.resolve().parent)
    rank = 32 if rank is None and budget is None else rank
    chosen = kinds.split(",") if kinds is not None else None
    if factors is not None and plan is None:
        raise ArgumentError("--factors goes with --plan, whose factors they are")
    corrected = CachePlan.load(plan) if plan is not None else None
    with progress_bar("loading", as_json) as report:
        traced = TracedModel(load_model(model, parse_device(device), parse_dtype(dtype)))
        source = measured(
            traced, load_scheduler(model, scheduler), method, stats, report, samples=samples, seed=seed,
            steps=50 if steps is None and plan is None else steps, guidance_scale=guidance,
            limits={
                "period": parse_period(period), "kinds": chosen, "memory_gb": memory_gb, "sketch": sketch,
                "plan": corrected, "factors": load_factors(plan, factors) if plan is not None else None,
            },
        )  # fmt: skip
        report("factorising", 0, 1)
        new_factors = factors_traced(
            traced, source, method=method, rank=rank, budget=budget, scale=scale, kinds=chosen, shrinkage=shrinkage
        )
    new_factors.save(out)
    show_factors(new_factors, out, as_json, {"passes": source.passes} if isinstance(source, Covariances) else {})


@factors_app.command(name="show")
@reports_errors
def factors_show(file: Annotated[Path, typer.Argument(help="a factors file")], as_json: Json = False) -> None:
    """Show what factors are of, their ranks and errors by place, and what they cost."""
    show_factors(Factors.load(file), file, as_json, {})


@factors_app.command(name="ranks")
@reports_errors
def factors_ranks(
    context: typer.Context,
    model: Model,
    ranks: Annotated[str, typer.Option(help="to compare: 8,16,32")] = "8,16,32,64",
    method: Method = "cov",
    scale: Scale = None,
    kinds: Kinds = None,
    steps: Steps = 50,
    samples: Samples = 8,
    seed: Seed = 0,
    guidance: Guidance = 1.0,
    period: Period = None,
    shrinkage: Shrinkage = None,
    memory_gb: MemoryGb = None,
    stats: Stats = None,
    scheduler: SchedulerName = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Compare ranks on increments of as many runs with other noise; maps where a larger rank is worse are named."""
    _refuse_strays(context, method, stats, {})
    chosen = kinds.split(",") if kinds is not None else None
    tried = [int(text) for text in ranks.split(",") if text.strip().isdigit()]
    if len(tried) != len(ranks.split(",")):
        raise ArgumentError(f"--ranks is {ranks!r}; expected whole numbers such as 8,16,32")
    with progress_bar("loading", as_json) as report:
        traced = TracedModel(load_model(model, parse_device(device), parse_dtype(dtype)))
        chosen_scheduler = load_scheduler(model, scheduler)
        settings: dict[str, Any] = {"steps": steps, "samples": samples, "guidance_scale": guidance}
        limits: dict[str, Any] = {"period": parse_period(period), "kinds": chosen, "memory_gb": memory_gb}
        source = measured(traced, chosen_scheduler, method, stats, report, seed=seed, limits=limits, **settings)
        held_out = covariances_traced(
            traced, chosen_scheduler, seed=seed + 1, whole=method == "whole", on_step=lambda d, t: report("holding out", d, t),
            **settings, **limits,
        )  # fmt: skip
        ranked = report_traced(traced, source, held_out, tried, method=method, scale=scale, kinds=chosen, shrinkage=shrinkage)
    worse = {path: [list(pair) for pair in pairs] for path, pairs in ranked.worse.items()}
    facts = {"method": method, "held_out_error": {str(rank): error for rank, error in ranked.mean.items()}, "worse": worse}
    if as_json:
        print(json.dumps(facts))
        return
    console = Console(highlight=False, soft_wrap=True)
    for rank, error in ranked.mean.items():
        console.print(f"rank {rank:<6}relative error {error:.4f}", markup=False)
    for path, pairs in ranked.worse.items():
        where = ", ".join(f"rank {more} is worse than {less}" for less, more in pairs)
        console.print(f"! {path}: {where}", style="yellow", markup=False)


def measured(
    traced: TracedModel,
    scheduler: Any,
    method: str,
    stats: Path | None,
    report: Any,
    *,
    limits: Mapping[str, Any],
    **settings: Any,
) -> Source:
    """What a method is made from."""
    wanted = source_kind(method)
    if wanted is CalibrationStats:
        if stats is not None:
            return CalibrationStats.load(stats)
        return calibrate_traced(traced, scheduler, on_step=lambda d, t: report("calibrating", d, t), **settings)
    if wanted is Covariances:
        on_step = lambda d, t: report("measuring covariances", d, t)  # noqa: E731
        return covariances_traced(traced, scheduler, whole=method == "whole", on_step=on_step, **settings, **limits)
    return None


def _refuse_strays(context: typer.Context, method: str, stats: Path | None, more: Mapping[str, Any]) -> None:
    """Refuse what has no effect with a method, or where statistics of earlier runs are given."""
    if stats is not None and source_kind(method) is not CalibrationStats:
        raise ArgumentError(f"--stats is for the methods ca and cd; {method} is not made from statistics")
    asked = [method, *(["runs"] if stats is None and source_kind(method) is not None else [])]
    refuse_strays(context, {**BELONGS, **more}, asked, f"the method {method}" if stats is None else "--stats")


def parse_period(text: str | None) -> list[int] | None:
    """Whole numbers from "2" or "2,3"."""
    if text is None:
        return None
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ArgumentError(f"--period is {text!r}; expected a whole number such as 2, or several as 2,3")
    return [int(part) for part in text.split(",")]


def show_factors(factors: Factors, path: Path, as_json: bool, more: Mapping[str, Any]) -> None:
    """What factors are of, and a line for every place of the model."""
    places: dict[str, list[str]] = {}
    for name in factors.maps:
        places.setdefault(place_of(name), []).append(name)
    ranks = factors.ranks
    table: dict[str, dict[str, Any]] = {
        place: {
            "maps": len(paths),
            "ranks": [min(ranks[name] for name in paths), max(ranks[name] for name in paths)],
            "error": mean_error({name: factors.errors[name] for name in paths}) if set(paths) <= set(factors.errors) else None,
        }
        for place, paths in places.items()
    }
    facts: dict[str, Any] = {
        "file": str(path), "digest": factors.digest, "model": factors.model, "fingerprint": factors.fingerprint,
        "dtype": factors.dtype, "method": factors.method, "arguments": dict(factors.arguments), "maps": len(factors.maps),
        "affine": len(factors.affine), "bytes": factors.bytes, **more,
    }  # fmt: skip
    if as_json:
        print(json.dumps(facts | {"places": table}))
        return
    show(facts, as_json=False)
    grid = Table()
    for name in ("place", "maps", "rank", "error"):
        grid.add_column(name, justify="left" if name == "place" else "right")
    for place, entry in table.items():
        low, high = entry["ranks"]
        error = "" if entry["error"] is None else f"{entry['error']:.4f}"
        grid.add_row(place, str(entry["maps"]), str(low) if low == high else f"{low}..{high}", error)
    Console(highlight=False).print(grid)
