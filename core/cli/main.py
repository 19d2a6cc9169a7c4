"""The `stepgraph` command."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from stepgraph.cli.artifact import cache_app, load_saved, scheduler_for
from stepgraph.cli.bench import bench_app
from stepgraph.cli.demo import Demo, run_demo
from stepgraph.cli.doctor import examine
from stepgraph.cli.export import export_command
from stepgraph.cli.factors import factors_app
from stepgraph.cli.options import (
    MODEL_HELP,
    AllowStochastic,
    Backend,
    Batch,
    Device,
    Dtype,
    FactorsFile,
    Json,
    Model,
    Out,
    SchedulerName,
    Seed,
    Steps,
    load_factors,
    messages,
    parse_device,
    parse_dtype,
    process_group,
    progress_bar,
    refuse_strays,
    reports_errors,
    show,
)
from stepgraph.cli.plan import plan_app
from stepgraph.compiler.calibration.calibrate import calibrate, unfinished_files
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.models import family_of
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.tracing.describe import example_inputs
from stepgraph.config import SLOT_DTYPES, CompileConfig
from stepgraph.errors import ArgumentError
from stepgraph.files.whole_file import save_tensors, whole_file, writable_folder
from stepgraph.fingerprint import config_of, model_dtype
from stepgraph.metrics import psnr, relative_l2
from stepgraph.plan import CachePlan
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.sampling.sample import sample

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__.strip() if __doc__ else None, rich_markup_mode=None)
app.add_typer(plan_app, name="plan")
app.add_typer(factors_app, name="factors")
app.add_typer(bench_app, name="bench")
app.add_typer(cache_app, name="cache")
app.command(name="export")(export_command)


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
    factors: FactorsFile = None,
    exact: Annotated[bool, typer.Option(help="bit-equal to the eager model; needs --backend eager")] = False,
    hoist_limit_mb: Annotated[float | None, typer.Option(help="most megabytes of what is computed before the loop")] = None,
    prepack: Annotated[bool, typer.Option(help="with inductor on a CPU: a copy of linear weights in oneDNN's layout")] = True,
    merge: Annotated[
        bool, typer.Option(help="with packed weights: run linear maps of one input, as q, k and v, as one")
    ] = True,
    slot_dtype: Annotated[str | None, typer.Option(help=f"keep stored values as {', '.join(SLOT_DTYPES)}")] = None,
    offload: Annotated[bool, typer.Option(help="keep stored values in host memory between uses that are far apart")] = False,
    dump: Annotated[Path | None, typer.Option(help="write the readable graph of every variant into this folder")] = None,
    save: Annotated[Path | None, typer.Option(help="write an artifact: a folder, or a file that ends in .zip")] = None,
    with_weights: Annotated[bool, typer.Option("--with-weights", help="put the weights into the artifact")] = False,
    as_json: Json = False,
) -> None:
    """Compile a plan for a model, run its first steps once, and report stages, variants, MACs and memory."""
    if with_weights and save is None:
        raise ArgumentError("--with-weights goes with --save, which says where the artifact is written")
    with progress_bar("compiling", as_json) as report:
        report("loading", 0, 3)
        loaded = load_model(model, parse_device(device), parse_dtype(dtype))
        report("compiling", 1, 3)
        inputs = example_inputs(loaded, batch)
        config = CompileConfig(
            backend, exact, hoist_limit_mb=hoist_limit_mb, prepack=prepack, merge=merge, slot_dtype=slot_dtype, offload=offload
        )
        executable = compile_plan(loaded, CachePlan.load(plan), inputs, config, load_factors(plan, factors))
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
        "regions": program.regions,
        "tables": len(program.hoisted.tables) if program.hoisted is not None else 0,
        "seconds": {**program.seconds, "first_step": first},
        "macs": macs.computed,
        "macs_total": macs.total,
        "ideal_speedup": macs.ideal_speedup,
        "memory": asdict(executable.memory()),
        "fused_operations": executable.providers(),
    }
    if dump is not None:
        facts["dumped"] = dump_variants(executable, writable_folder(dump))
    if save is not None:
        executable.save(save, with_weights, scheduler_for(executable, model))
        facts["saved"] = str(save)
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
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=f"{MODEL_HELP}; not for an artifact that has weights")] = None,
    plan: Annotated[Path | None, typer.Option(help="the plan file")] = None,
    artifact: Annotated[Path | None, typer.Option(help="what `stepgraph compile --save` wrote, in place of a plan")] = None,
    images: Annotated[int, typer.Option(min=1, help="how many samples")] = 8,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale; 1 for none")] = 2.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backend: Backend = "eager",
    factors: FactorsFile = None,
    scheduler: SchedulerName = None,
    compare: Annotated[bool, typer.Option(help="sample with the eager model too, and report the difference")] = False,
    out: Out = Path("out"),
    as_json: Json = False,
) -> None:
    """Sample with a compiled plan; write the latents, and a contact sheet where they are images."""
    belongs = dict.fromkeys(("plan", "backend", "factors", "dtype"), ("a model", ("plan",)))
    refuse_strays(context, belongs, ["plan" if artifact is None else "artifact"], "--artifact, which brings its own")
    out = writable_folder(out)
    executable: Executable | None = None
    with progress_bar("loading", as_json):
        if plan is None and artifact is not None:
            executable, chosen = load_saved(artifact, model, parse_device(device), scheduler)
            loaded, cache_plan = executable.model, executable.plan
        elif plan is not None and model is not None:
            loaded, cache_plan = load_model(model, parse_device(device), parse_dtype(dtype)), CachePlan.load(plan)
            chosen = load_scheduler(model, scheduler)
        else:
            raise ArgumentError("say what to run: either a model with --plan, or --artifact")
    guided = guidance > 1
    inputs = example_inputs(loaded, images * (2 if guided and cache_plan.header.guidance != "separate" else 1))
    cond, uncond = family_of(loaded).conditioning(config_of(loaded), images, torch.device(device))
    conditioning = cond | ({f"negative_{name}": value for name, value in uncond.items()} if guided else {})
    shape = next(iter(inputs.values())).shape[1:]
    noise = torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed)).to(device, model_dtype(loaded))
    with progress_bar("compiling", as_json) as report:
        if executable is None and plan is not None:
            executable = compile_plan(loaded, cache_plan, inputs, CompileConfig(backend), load_factors(plan, factors))

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
    from stepgraph.assets.glyphs import contact_sheet

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
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale of the runs; 1 for none")] = 1.0,
    scheduler: SchedulerName = None,
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
            "mean_relative_change": {kind: float(stats.relative_change[1:, own].mean()) for kind, own in columns.items()},
            "ms_per_site": {kind: float(stats.ms[own].mean()) for kind, own in columns.items()},
        },
        as_json,
    )


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


def main() -> None:
    """Entry point of the `stepgraph` command."""
    try:
        app()
    except KeyboardInterrupt:
        messages.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
