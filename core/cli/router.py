"""`stepgraph plan train-router`: Learning-to-Cache's routers, trained and kept."""

from pathlib import Path
from typing import Annotated

import typer

from stepgraph.cli.options import (
    Arguments,
    Device,
    Dtype,
    Json,
    Model,
    ScheduleOption,
    SchedulerName,
    StepsOrSchedule,
    parse_arguments,
    parse_device,
    parse_dtype,
    progress_bar,
    reports_errors,
    show,
)
from stepgraph.cli.shipped import conditions, schedule_of
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.routers.router_settings import PRESETS, settings_of
from stepgraph.compiler.routers.train_router import train_router
from stepgraph.errors import ArgumentError
from stepgraph.files.whole_file import writable_folder
from stepgraph.schedule import counted_steps


@reports_errors
def plan_train_router(
    model: Model,
    steps: StepsOrSchedule = None,
    scheduler: SchedulerName = None,
    schedule: ScheduleOption = None,
    preset: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}: settings that -a changes")] = "quick",
    arg: Arguments = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    export: Annotated[Path | None, typer.Option(help="write them in the form of the paper's code too (.pt)")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the routers")] = Path("router.safetensors"),
    as_json: Json = False,
) -> None:
    """Train Learning-to-Cache's routers; `plan make --policy l2c -a router=...` makes plans of them, for any theta.

    The settings are those of the policy l2c (`stepgraph plan policies`), such as -a lam=1e-4. A training that was interrupted
    goes on where it was when the same command is given again.
    """
    writable_folder(out.resolve().parent)
    settings = settings_of(preset, parse_arguments(arg))
    if export is not None and export.suffix not in (".pt", ".pth"):
        raise ArgumentError(f"{export}: the paper's form is a checkpoint; name it .pt or .pth")
    checkpoint = out.with_name(f"{out.name}.unfinished")
    with progress_bar("loading", as_json) as report:
        loaded = load_model(model, parse_device(device), parse_dtype(dtype))
        chosen, wish = load_scheduler(model, scheduler), parse_arguments(schedule)
        count = counted_steps(wish, steps, chosen, 50)[1]
        router = train_router(
            loaded, chosen, steps=count, settings=settings, checkpoint=checkpoint,
            on_step=lambda done, total: report("training", done, total), schedule=schedule_of(model, wish, count),
            conditioning=conditions(model, loaded, settings.pool, settings.label_dropout > 0),
        )  # fmt: skip
    router.save(out)
    if export is not None:
        router.export(export)
    checkpoint.unlink(missing_ok=True)
    routed = router.reused(1.0)
    facts = {
        "written": [str(path) for path in (out, export) if path is not None],
        "squared_error": float(router.history[-1, 0]),
        "reused_of_routed": {f"theta {t:g}": float(router.reused(t)[routed].double().mean()) for t in (0.1, 0.5, 0.9)},
    }
    show(facts, as_json)
