"""The `stepgraph` command."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stepgraph.compiler.calibrate import calibrate
from stepgraph.compiler.describe import example_inputs
from stepgraph.compiler.import_plan import import_plan
from stepgraph.compiler.importers import EXPORTERS
from stepgraph.compiler.make_plan import make_plan
from stepgraph.compiler.models import family_of
from stepgraph.compiler.models.load import SCHEDULERS, load_model, load_scheduler
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.policies import POLICIES
from stepgraph.compiler.stats import CalibrationStats
from stepgraph.compiler.trace import TraceError
from stepgraph.config import BACKENDS, CompileConfig, CompileError
from stepgraph.demo import Demo, run_demo
from stepgraph.doctor import examine
from stepgraph.env import read_env
from stepgraph.files import save_tensors, whole_file
from stepgraph.fingerprint import config_of
from stepgraph.metrics import psnr, relative_l2
from stepgraph.plan import CachePlan, PlanError
from stepgraph.plan_report import diff_plans
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.sampler import sample

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__.strip() if __doc__ else None, rich_markup_mode=None)
plan_app = typer.Typer(no_args_is_help=True, help="Make, show and compare cache plans.")
app.add_typer(plan_app, name="plan")

messages = Console(stderr=True)
MODEL_HELP = "glyph-dit, a diffusers folder or hub id, or NAME:random (dit-xl-2-256:random)"

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
Batch = Annotated[int, typer.Option(min=1, help="rows of the model's input: images, twice that with guidance")]
Seed = Annotated[int, typer.Option(help="of the noise")]
Out = Annotated[Path, typer.Option(help="folder for what is written")]
Arguments = Annotated[
    list[str] | None, typer.Option("--arg", "-a", help="an argument of the policy as name=value, the value as JSON: -a every=3")
]

EXPECTED = (PlanError, CompileError, TraceError, OSError, ValueError)


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


def parse_arguments(pairs: list[str] | None) -> dict[str, Any]:
    """Policy arguments from name=value; a value that is not JSON is taken as text."""
    arguments: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise PlanError(f"{pair!r} is not an argument; expected name=value, such as every=3")
        try:
            arguments[name] = json.loads(text)
        except json.JSONDecodeError:
            arguments[name] = text
    return arguments


def folder(path: Path) -> Path:
    """A folder that can be written; made if it does not exist."""
    path.mkdir(parents=True, exist_ok=True)
    with whole_file(path / ".writable") as probe:
        probe.write_text("")
    (path / ".writable").unlink()
    return path


@app.command()
@reports_errors
def demo(
    out: Out = Path("out"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backend: Backend = "eager",
    steps: Steps = 50,
    images: Annotated[int, typer.Option(min=1, help="how many images")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="timed rounds; each runs every plan once")] = 3,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Sample the shipped model fully and with two cache plans; print what each costs and write the pictures."""
    with progress_bar("loading", as_json) as report:
        result = run_demo(
            out, device=parse_device(device), dtype=parse_dtype(dtype), backend=backend, steps=steps, images=images,
            rounds=rounds, seed=seed, on_step=report,
        )  # fmt: skip
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        show_demo(result)


def show_demo(result: Demo) -> None:
    """The demo's table and where its pictures are."""
    # Where there is no terminal to fit into, the table keeps its columns.
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table(title=f"glyph-dit, DDIM {result.steps}, {result.images} images, guidance {result.guidance_scale:g}")
    for name in ("", "GMAC/image", "ms/step", "speed-up", "rel-L2", "PSNR dB", "accuracy", "peak slots MB"):
        table.add_column(name, justify="left" if not name else "right")
    for row in result.rows:
        table.add_row(
            row.name, f"{row.gmacs:.3f}", f"{row.ms_per_step:.1f}", f"{row.speedup:.2f}x", f"{row.relative_l2:.4f}",
            "equal" if row.psnr is None else f"{row.psnr:.1f}", f"{row.accuracy:.3f}", f"{row.peak_slot_mb:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{result.device}, {result.dtype}, backend {result.backend}; medians of {result.rounds} interleaved rounds; "
        f"rel-L2 and PSNR against the eager model from the same noise",
        style="dim",
    )
    for picture in result.pictures:
        console.print(f"wrote {picture}", highlight=False)


@app.command(name="compile")
@reports_errors
def compile_command(
    model: Model,
    plan: Annotated[Path, typer.Option(help="the plan file")],
    batch: Batch = 2,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backend: Backend = "inductor",
    exact: Annotated[bool, typer.Option(help="bit-equal to the eager model; needs --backend eager")] = False,
    dump: Annotated[Path | None, typer.Option(help="write the readable graph of every variant into this folder")] = None,
    as_json: Json = False,
) -> None:
    """Compile a plan for a model, run its first steps once, and report stages, variants, MACs and memory."""
    with progress_bar("compiling", as_json) as report:
        report("loading", 0, 3)
        loaded = load_model(model, parse_device(device), parse_dtype(dtype))
        report("compiling", 1, 3)
        inputs = example_inputs(loaded, batch)
        executable = compile_plan(loaded, CachePlan.load(plan), inputs, CompileConfig(backend, exact))
        report("first step", 2, 3)
        started = time.perf_counter()
        executable.session()(**inputs)
        first = time.perf_counter() - started
    program, macs = executable.default, executable.macs()
    facts = {
        "model": model,
        "backend": backend,
        "batch": batch,
        "steps": executable.plan.steps,
        "variants": len(program.variants),
        "nodes_per_variant": [len(variant.graph.graph.nodes) for variant in program.variants],
        "seconds": {**program.seconds, "first_step": first},
        "macs": macs.computed,
        "macs_total": macs.total,
        "ideal_speedup": macs.ideal_speedup,
        "memory": asdict(executable.memory()),
    }
    if dump is not None:
        facts["dumped"] = dump_variants(executable, folder(dump))
    show(facts, as_json)


def dump_variants(executable: Executable, out: Path) -> list[str]:
    """Write the source of every variant; returns the paths."""
    paths = []
    for number in range(len(executable.default.variants)):
        step = executable.default.rows.index(number)
        path = out / f"variant{number:03d}-step{step:03d}.py"
        with whole_file(path) as partial:
            partial.write_text(executable.print_readable(step), encoding="utf-8")
        paths.append(str(path))
    return paths


@app.command()
@reports_errors
def run(
    model: Model,
    plan: Annotated[Path, typer.Option(help="the plan file")],
    images: Annotated[int, typer.Option(min=1, help="how many samples")] = 8,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale; 1 for none")] = 2.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backend: Backend = "eager",
    scheduler: SchedulerName = None,
    compare: Annotated[bool, typer.Option(help="sample with the eager model too, and report the difference")] = False,
    out: Out = Path("out"),
    as_json: Json = False,
) -> None:
    """Sample with a compiled plan; write the latents, and a contact sheet where they are images."""
    out = folder(out)
    cache_plan = CachePlan.load(plan)
    with progress_bar("loading", as_json):
        loaded = load_model(model, parse_device(device), parse_dtype(dtype))
    chosen = load_scheduler(model, scheduler)
    guided = guidance > 1
    inputs = example_inputs(loaded, images * (2 if guided and cache_plan.header.guidance != "separate" else 1))
    cond, uncond = family_of(loaded).conditioning(config_of(loaded), images, torch.device(device))
    conditioning = cond | ({f"negative_{name}": value for name, value in uncond.items()} if guided else {})
    shape = next(iter(inputs.values())).shape[1:]
    noise = torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed)).to(device, parse_dtype(dtype))
    with progress_bar("compiling", as_json) as report:
        executable = compile_plan(loaded, cache_plan, inputs, CompileConfig(backend))

        def timed(name: str, runner: Any) -> tuple[torch.Tensor, float]:
            started = time.perf_counter()
            steps = cache_plan.header.steps
            result = sample(
                runner, chosen, noise, guidance, steps=steps, on_step=lambda d, t: report(name, d, t), **conditioning
            )
            if result.is_cuda:
                torch.cuda.synchronize()
            return result, time.perf_counter() - started

        latents, seconds = timed("sampling", executable)
        facts: dict[str, Any] = {"seconds": seconds, "written": write_samples(out, latents)}
        if compare:
            # The runs above and the first eager one warm up; the second of each, one right after the other, are compared.
            timed("eager model", loaded)
            latents, seconds = timed("sampling again", executable)
            reference, eager_seconds = timed("eager model again", loaded)
            facts |= {"seconds": seconds, "eager_seconds": eager_seconds, "speedup": eager_seconds / seconds}
            facts |= {"relative_l2": relative_l2(latents, reference), "psnr": psnr(latents, reference)}
    show(facts, as_json)


def write_samples(out: Path, latents: torch.Tensor) -> list[str]:
    """Latents as safetensors, and as a contact sheet where they have three channels."""
    from stepgraph.glyphs import contact_sheet

    paths = [out / "samples.safetensors"]
    save_tensors(paths[0], {"latents": latents.cpu().contiguous()})
    if latents.ndim == 4 and latents.shape[1] == 3:
        paths.append(out / "samples.png")
        with whole_file(paths[1]) as partial:
            contact_sheet(latents).save(partial)
    return [str(path) for path in paths]


@app.command(name="calibrate")
@reports_errors
def calibrate_command(
    model: Model,
    steps: Steps = 50,
    samples: Annotated[int, typer.Option(min=1, help="sampling runs to average over, one sample each")] = 16,
    seed: Seed = 0,
    scheduler: SchedulerName = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the statistics")] = Path("stats.safetensors"),
    as_json: Json = False,
) -> None:
    """Watch a model's sites during real sampling runs; the statistics are what `plan make --stats` needs."""
    folder(out.resolve().parent)
    loaded = load_model(model, parse_device(device), parse_dtype(dtype))
    chosen = load_scheduler(model, scheduler)
    with progress_bar("calibrating", as_json) as report:
        stats = calibrate(
            loaded,
            chosen,
            steps=steps,
            samples=samples,
            seed=seed,
            on_step=lambda done, total: report("calibrating", done, total),
        )
    stats.save(out)
    kinds = list(dict.fromkeys(site.kind for site in stats.sites))
    columns = {kind: [i for i, site in enumerate(stats.sites) if site.kind == kind] for kind in kinds}
    change = {kind: float(stats.relative_change[1:, own].mean()) for kind, own in columns.items()}
    show(
        {"written": str(out), "steps": len(stats.header.timesteps), "samples": samples, "mean_relative_change": change}, as_json
    )


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
        loaded = load_model(model, "cpu", parse_dtype(dtype))
        chosen = load_scheduler(model, scheduler)
        steps = 50 if steps is None and measured is None else steps
        made = make_plan(policy, measured, model=loaded, scheduler=chosen, steps=steps, guidance=guidance, **arguments)
    made.save(out)
    show_plan(made, as_json, f"wrote {out}")


@plan_app.command(name="import")
@reports_errors
def plan_import(
    file: Annotated[Path, typer.Argument(help="an InvarDiff cache book, a SmoothCache schedule or an L2C router checkpoint")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    steps: Steps = 50,
    scheduler: SchedulerName = None,
    dtype: Dtype = "float32",
    arg: Arguments = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the plan")] = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Turn a published plan file, recognised by its content, into a plan for a model."""
    loaded = load_model(model, "cpu", parse_dtype(dtype))
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


@app.command()
@reports_errors
def doctor(as_json: Json = False) -> None:
    """Show versions, devices, compilers and caches, and what is missing."""
    report = examine()
    if as_json:
        print(json.dumps(report))
        return
    console = Console(highlight=False, soft_wrap=True)
    for section, entries in report.items():
        if section == "advice":
            continue
        console.print(section, style="bold")
        for name, value in entries.items():
            console.print(f"  {name:<24}{value}", markup=False)
    for line in report["advice"]:
        console.print(f"! {line}", style="yellow", markup=False)
    if not report["advice"]:
        console.print("nothing is missing", style="green")


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Facts as JSON or as lines."""
    if as_json:
        print(json.dumps(facts))
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, value in facts.items():
        console.print(f"{name:<22}{_pretty(value)}", markup=False)


def _pretty(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_pretty(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_pretty, value))
    return str(value)


def main() -> None:
    """Entry point of the `stepgraph` command."""
    try:
        app()
    except KeyboardInterrupt:
        messages.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
