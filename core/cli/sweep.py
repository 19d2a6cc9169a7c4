"""`stepgraph plan sweep`: one knob of a policy, error against MACs."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from stepgraph.cli.options import (
    MODEL_HELP,
    Arguments,
    Device,
    Dtype,
    Json,
    ScheduleOption,
    SchedulerName,
    Seed,
    parse_arguments,
    parse_device,
    parse_dtype,
    progress_bar,
    reports_errors,
)
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.entry.sweep import sweep
from stepgraph.compiler.planning.list_policies import policies
from stepgraph.compiler.planning.sweep_result import Sweep
from stepgraph.errors import ArgumentError
from stepgraph.schedule import counted_steps


@reports_errors
def plan_sweep(
    policy: Annotated[str, typer.Option(help="as for `plan make`")],
    knob: Annotated[str, typer.Option(help="the argument to sweep; several take the same values together: attn,ff")],
    values: Annotated[str | None, typer.Option(help="what to try: 0.05,0.1,0.2")] = None,
    start: Annotated[float | None, typer.Option("--from", help="or the first value of a range")] = None,
    stop: Annotated[float | None, typer.Option("--to", help="and the last one")] = None,
    points: Annotated[int, typer.Option(min=2, help="how many values the range has")] = 8,
    log: Annotated[bool, typer.Option("--log", help="space the range by equal factors")] = False,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "glyph-dit",
    stats: Annotated[Path | None, typer.Option(help="statistics of `stepgraph calibrate`; they bring the steps")] = None,
    steps: Annotated[int | None, typer.Option(help="number of inference steps; 50, or what the statistics have")] = None,
    scheduler: SchedulerName = None,
    schedule: ScheduleOption = None,
    samples: Annotated[int, typer.Option(min=1, help="samples behind every error")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="most samples that are run at once")] = 32,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale; 1 for none")] = 2.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    arg: Arguments = None,
    plot: Annotated[Path, typer.Option(help="where to draw error against MACs")] = Path("sweep.png"),
    save: Annotated[Path | None, typer.Option(help="write the plan at the knee here")] = None,
    as_json: Json = False,
) -> None:
    """Sweep a policy's knob: run every plan, and compare its error and MACs with fewer steps of the same sampler."""
    knobs = tuple(knob.split(","))
    tried = parse_values(policy, knobs, values, start, stop, points, log)
    measured = CalibrationStats.load(stats) if stats is not None else None
    with progress_bar("loading", as_json) as report:
        loaded = load_model(model, parse_device(device), parse_dtype(dtype))
        chosen, wish = load_scheduler(model, scheduler), parse_arguments(schedule)
        result = sweep(
            policy, measured, model=loaded, scheduler=chosen, knob=knobs, values=tried, schedule=wish,
            steps=counted_steps(wish, steps, chosen, 50)[1] if measured is None else steps, samples=samples,
            guidance_scale=guidance, seed=seed, batch=batch, arguments=parse_arguments(arg), on_step=report,
        )  # fmt: skip
    result.plot(plot)
    if not as_json:
        show_sweep(result)
        print(f"wrote {plot}")
    if save is not None:
        if result.knee is None:
            raise ArgumentError(
                f"this sweep has no knee whose plan could be written to {save}; choose a value, and use `plan make`"
            )
        result.knee.plan.save(save)
    if as_json:
        print(json.dumps(result.as_dict() | {"plot": str(plot), "saved": str(save) if save is not None else None}))
    elif save is not None:
        print(f"wrote {save}")


def parse_values(
    policy: str, knobs: tuple[str, ...], values: str | None, start: float | None, stop: float | None, points: int, log: bool
) -> list[Any]:
    """What to try, from a list or from a range; whole numbers for a knob that takes nothing else."""
    if (values is None) == (start is None or stop is None):
        raise ArgumentError("say what to try, either --values 0.05,0.1,0.2 or --from 0.05 --to 0.4 (with --points, --log)")
    if values is not None:
        return [parse_arguments([f"value={text.strip()}"])["value"] for text in values.split(",")]
    assert start is not None
    assert stop is not None
    if log and not (start > 0 and stop > 0):
        raise ArgumentError(f"--log needs a range above 0; got {start:g} to {stop:g}")
    spaced = (np.geomspace if log else np.linspace)(start, stop, points)
    # Rounded to what a person would have typed.
    candidates = [float(f"{value:.4g}") for value in spaced.tolist()]
    record = policies().get(policy)
    types = {argument.name: argument.type for argument in record.arguments} if record is not None else {}
    whole = all(types.get(name, "").startswith("int") for name in knobs)
    return [round(value) for value in candidates] if whole else candidates


def show_sweep(result: Sweep) -> None:
    """The sweep's table, and what it says."""
    # Where there is no terminal to fit into, the table keeps its columns.
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    title = (
        f"{result.policy}, {result.scheduler} {result.steps} steps, guidance {result.guidance_scale:g}, N = {result.samples}"
    )
    table = Table(title=title)
    for name in (", ".join(result.knobs), "GMAC/image", "fewer MACs", "rel-L2", "standard error", "fewer steps", ""):
        table.add_column(name, justify="right" if name else "left")
    knee, better = result.knee, 0
    for point in result.points:
        baseline = result.fewer_steps_error(point.macs)
        wins = baseline is not None and point.error < baseline
        better += wins
        marks = [mark for mark, holds in (("knee", point is knee), ("better than fewer steps", wins)) if holds]
        ratio = f"{result.macs_full / point.macs:.2f}x" if point.macs else "-"
        table.add_row(
            str(point.value), f"{point.macs / 1e9:.3f}", ratio, f"{point.error:.4f}", f"{point.standard_error:.4f}",
            "-" if baseline is None else f"{baseline:.4f}", ", ".join(marks),
        )  # fmt: skip
    console.print(table)
    shorter = ", ".join(f"{fewer.steps} steps {fewer.error:.4f}" for fewer in result.baseline)
    console.print(
        f"rel-L2 of the final latents to full compute from the same noise; fewer steps: the same sampler at equal MACs "
        f"({shorter}); {better} of {len(result.points)} plans beat it",
        style="dim",
    )
    if knee is None:
        console.print("no knee: fewer than three plans that no other beats, or none below the line between the ends")
