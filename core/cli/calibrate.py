"""`stepgraph calibrate`: what a model's sites do during real sampling runs."""

from pathlib import Path
from typing import Annotated

import typer

from stepgraph.cli.options import (
    AllowStochastic,
    Device,
    Dtype,
    Json,
    Model,
    ScheduleOption,
    SchedulerName,
    Seed,
    StepsOrSchedule,
    parse_arguments,
    parse_device,
    parse_dtype,
    process_group,
    progress_bar,
    reports_errors,
    show,
)
from stepgraph.cli.shipped import conditions, schedule_of
from stepgraph.compiler.calibration.calibrate import calibrate, unfinished_files
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.files.whole_file import writable_folder


@reports_errors
def calibrate_command(
    model: Model,
    steps: StepsOrSchedule = None,
    samples: Annotated[int, typer.Option(min=1, help="sampling runs to average over, one sample each")] = 16,
    seed: Seed = 0,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale of the runs; 1 for none")] = 1.0,
    scheduler: SchedulerName = None,
    schedule: ScheduleOption = None,
    eta: Annotated[float, typer.Option(help="DDIM's share of noise put back, 0..1; above 0 needs --allow-stochastic")] = 0.0,
    allow_stochastic: AllowStochastic = False,
    channels: Annotated[bool, typer.Option(help="keep per-channel means of all linear maps, for low-rank corrections")] = True,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    plot: Annotated[Path | None, typer.Option(help="write the invariance pictures to this PNG")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the statistics")] = Path("stats.safetensors"),
    as_json: Json = False,
) -> None:
    """Watch a model's sites during real sampling runs; the statistics are what `plan make --stats` needs.

    A calibration that was interrupted goes on where it was when the same command is given again: its sums lie beside the
    statistics until they are complete. With torchrun the processes share the samples.
    """
    writable_folder(out.resolve().parent)
    checkpoint = out.with_name(f"{out.name}.unfinished")
    with process_group(device) as (own_device, first):
        loaded = load_model(model, parse_device(own_device), parse_dtype(dtype))
        chosen = load_scheduler(model, scheduler)
        with progress_bar("calibrating", as_json or not first) as report:
            stats = calibrate(
                loaded, chosen, steps=steps, samples=samples, seed=seed, guidance_scale=guidance, channels=channels, eta=eta,
                allow_stochastic=allow_stochastic, checkpoint=checkpoint, on_step=lambda d, t: report("calibrating", d, t),
                schedule=schedule_of(model, parse_arguments(schedule), steps or 50),
                conditioning=conditions(model, loaded, samples, guidance > 1),
            )  # fmt: skip
        if not first:
            return
        stats.save(out)
    for left in unfinished_files(checkpoint):
        left.unlink(missing_ok=True)
    if plot is not None:
        stats.plot(plot)
    kinds = list(dict.fromkeys(site.kind for site in stats.sites))
    columns = {kind: [i for i, site in enumerate(stats.sites) if site.kind == kind] for kind in kinds}
    show(
        {
            "written": [str(path) for path in (out, plot) if path is not None],
            "steps": len(stats.header.timesteps),
            "samples": samples,
            "branches": list(stats.branches),
            "mean_relative_change": {kind: float(stats.relative_change[1:, sites].mean()) for kind, sites in columns.items()},
            "ms_per_site": {kind: float(stats.ms[sites].mean()) for kind, sites in columns.items()},
        },
        as_json,
    )
