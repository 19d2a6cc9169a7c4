"""What the commands share: arguments, errors, progress bars, output."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed

from stepgraph.compiler.entry.load_model import SCHEDULERS
from stepgraph.config import BACKENDS
from stepgraph.env import read_env
from stepgraph.errors import ArgumentError, CompileError, StepgraphError
from stepgraph.plan import CachePlan
from stepgraph.plan.factors import Factors

messages = Console(stderr=True)
MODEL_HELP = "glyph-dit, flux-emoji, a diffusers folder or hub id, or NAME:random (dit-xl-2-256:random)"

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
PlanFile = Annotated[Path, typer.Argument(help="a plan file")]
Json = Annotated[bool, typer.Option("--json", help="print JSON on standard output, for machines")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Backend = Annotated[str, typer.Option(help=f"{' or '.join(BACKENDS)}")]
SchedulerName = Annotated[
    str | None, typer.Option("--scheduler", help=f"{', '.join(SCHEDULERS)}; by default the one beside the model, else ddim")
]
Steps = Annotated[int, typer.Option(help="number of inference steps")]
StepsOrSchedule = Annotated[
    int | None, typer.Option(help="number of inference steps; 50, or as many as --schedule has sigmas or timesteps")
]
Batch = Annotated[int, typer.Option(min=1, help="rows of the model's input: images, twice that with guidance")]
Seed = Annotated[int, typer.Option(help="of the noise")]
AllowStochastic = Annotated[bool, typer.Option("--allow-stochastic", help="take a sampler that adds noise at every step")]
FactorsFile = Annotated[
    Path | None, typer.Option("--factors", help="low-rank factors; by default PLAN.factors.safetensors beside the plan")
]
Out = Annotated[Path, typer.Option(help="folder for what is written")]
Arguments = Annotated[
    list[str] | None, typer.Option("--arg", "-a", help="an argument of the policy as name=value, the value as JSON: -a every=3")
]
ScheduleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--schedule",
        help="what the pipeline sets its scheduler with, as name=value: sigmas=[1.0,0.5], timesteps=[999,500], mu=1.15, "
        "strength=0.6",
    ),
]

EXPECTED = (StepgraphError, OSError, ValueError)


def fail(message: str, as_json: bool) -> NoReturn:
    """Report an error where the caller looks for it, and leave with status 1."""
    if as_json:
        print(json.dumps({"error": message}))
    else:
        messages.print("error:", style="bold red", end=" ")
        messages.print(message, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What a user can have caused ends in one clear line; anything else keeps its traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            # A misspelt variable is an error before any work.
            read_env()
            command(*args, **kwargs)
        except EXPECTED as error:
            fail(str(error), bool(kwargs.get("as_json")))

    return run


@contextmanager
def progress_bar(what: str, as_json: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error; yields (description, done, total) -> None."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=messages, transient=True, disable=as_json or not messages.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda name, done, total: progress.update(task, description=name, completed=done, total=total)


@contextmanager
def process_group(device: str) -> Iterator[tuple[str, bool]]:
    """Under torchrun, its process group; yields this process's device and whether it is the first process."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield device, True
        return
    cuda = device.startswith("cuda")
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        rank = distributed.get_rank()
        yield (f"cuda:{rank % torch.cuda.device_count()}" if cuda else device), rank == 0
    finally:
        distributed.destroy_process_group()


def parse_device(device: str) -> str:
    """A usable device, or an error that says what there is."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise CompileError(f"unknown device {device!r}; expected cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise CompileError("no CUDA device is available here; use --device cpu, or see `stepgraph doctor`")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """A floating-point dtype by name."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise CompileError(f"unknown dtype {name!r}; expected {', '.join(known)}")
    return known[name]


def refuse_strays(
    context: typer.Context, belongs: Mapping[str, tuple[str, Collection[str]]], asked: Collection[str], what: str
) -> None:
    """Refuse options that were given on the command line and have no effect.

    Args:
        context: Of the command.
        belongs: Parameter -> what it goes with, in words, and by name.
        asked: Names of what was asked for.
        what: The same in words.

    Raises:
        PlanError: A parameter was given that goes with none of it.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        # By name: some releases of typer bring a click of their own.
        on_command_line = source is not None and source.name == "COMMANDLINE"
        words, names = belongs.get(parameter.name or "", ("", asked))
        if on_command_line and not set(names) & set(asked):
            shown = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper()
            raise ArgumentError(f"{shown} goes with {words}, not with {what}")


def factors_beside(plan: Path) -> Path:
    """Where a plan's factors are looked for."""
    return plan.with_name(f"{plan.stem}.factors.safetensors")


def load_factors(plan: Path, given: Path | None) -> Factors | None:
    """The factors that a plan is compiled with: the file named, or the one beside the plan."""
    path = given if given is not None else factors_beside(plan) if factors_beside(plan).is_file() else None
    return None if path is None else Factors.load(path)


def parse_arguments(pairs: list[str] | None) -> dict[str, Any]:
    """Policy arguments from name=value; a value that is not JSON is taken as text."""
    arguments: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ArgumentError(f"{pair!r} is not an argument; expected name=value, such as every=3")
        try:
            arguments[name] = json.loads(text)
        except json.JSONDecodeError:
            arguments[name] = text
    return arguments


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Facts as JSON or as lines."""
    if as_json:
        print(json.dumps(facts))
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, value in facts.items():
        console.print(f"{name:<22}{_pretty(value)}", markup=False)


def show_plan(plan: CachePlan, as_json: bool, note: str | None, more_warnings: Sequence[str] = ()) -> None:
    """A plan's summary, with warnings of the plan and of the command."""
    summary = plan.summary()
    summary = replace(summary, warnings=(*summary.warnings, *more_warnings))
    if as_json:
        print(json.dumps(summary.as_dict()))
        return
    header, console = plan.header, Console(highlight=False, soft_wrap=True)
    console.print(f"{header.model} {header.fingerprint}, {header.dtype}, {header.scheduler} {header.steps} steps", markup=False)
    console.print(str(summary), markup=False)
    if note:
        console.print(note, markup=False)


def _pretty(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_pretty(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_pretty, value))
    return str(value)
