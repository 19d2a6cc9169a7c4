"""`stepgraph demo`: the shipped model sampled fully and with two cache plans, measured side by side."""

import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from stepgraph.assets.glyphs import contact_sheet
from stepgraph.cli.options import (
    Backend,
    Device,
    Dtype,
    Json,
    Out,
    Seed,
    parse_device,
    parse_dtype,
    progress_bar,
    reports_errors,
)
from stepgraph.cli.shipped import SHIPPED
from stepgraph.compiler.entry.make_plan import plan_traced
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.errors import ArgumentError
from stepgraph.files.whole_file import save_figure, writable_folder
from stepgraph.metrics import psnr, relative_l2
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.sampling.sample import sample

PLANS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "FORA N=2": ("interval", {"every": 2}),
    "whole-step N=2": ("interval", {"every": 2, "kinds": ["hidden"]}),
}


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table; everything is compared with the eager model's images from the same noise.

    Attributes:
        name: Of the plan.
        gmacs: Multiply-accumulates per image of the whole run, both guidance halves, in 10^9.
        ms_per_step: Median over the rounds.
        speedup: Median over the rounds of the eager model's time over this one's in the same round.
        relative_l2: Of the final images.
        psnr: In dB; None where the images are equal.
        accuracy: Share of the images that the shipped classifier reads as what was asked for: for flux-emoji among its five
            best guesses.
        peak_slot_mb: Stored values for the whole batch.
    """

    name: str
    gmacs: float
    ms_per_step: float
    speedup: float
    relative_l2: float
    psnr: float | None
    accuracy: float
    peak_slot_mb: float


@dataclass(frozen=True)
class Demo:
    """What the demo measured, and the pictures it wrote."""

    model: str
    device: str
    dtype: str
    backend: str
    scheduler: str
    steps: int
    images: int
    guidance_scale: float
    rounds: int
    seed: int
    versions: Mapping[str, str]
    rows: tuple[DemoRow, ...]
    pictures: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def run_demo(
    out: Path,
    *,
    model_name: str = "glyph-dit",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "eager",
    steps: int | None = None,
    images: int = 32,
    guidance_scale: float = 2.0,
    rounds: int = 3,
    seed: int = 0,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Demo:
    """Sample with the eager model and every plan of `PLANS` from the same noise, in interleaved rounds.

    Args:
        out: Folder for the pictures; made if it does not exist.
        model_name: Which of the shipped models.
        device: Where to run.
        dtype: Of model and noise.
        backend: "eager" or "inductor".
        steps: Of its scheduler; as many as are usual unless given.
        images: How many, the classes or captions in turn.
        guidance_scale: Of classifier-free guidance, both halves in one batch.
        rounds: Timed rounds; in each, every runner samples all images once.
        seed: Of the noise.
        on_step: Called with (what runs, evaluations done, evaluations in all).

    Raises:
        OSError: `out` cannot be written; found before anything is sampled.
        ArgumentError: No such model is shipped.
    """
    writable_folder(out)
    if model_name not in SHIPPED:
        raise ArgumentError(f"no shipped model {model_name!r}; the demo has {', '.join(SHIPPED)}")
    shipped = SHIPPED[model_name](images, device, dtype, seed)
    model, scheduler, noise, steps = shipped.model, shipped.scheduler, shipped.noise, steps or shipped.steps
    schedule = shipped.schedule(steps)
    # One graph serves all plans and all executables.
    traced = TracedModel(model)
    inputs = traced.example_inputs(2 * images, shipped.inputs)
    plans = {
        name: plan_traced(policy, None, traced, scheduler, arguments, steps=steps, example_inputs=inputs, schedule=schedule)
        for name, (policy, arguments) in PLANS.items()
    }
    runners: dict[str, Executable | nn.Module] = {"eager diffusers": model}
    for name, plan in plans.items():
        runners[name] = compile_plan(model, plan, inputs, CompileConfig(backend), traced=traced)
    conditioning: dict[str, Any] = {**shipped.conditioning}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    latents: dict[str, torch.Tensor] = {}
    done, total = 0, (rounds * steps + 2) * len(runners)

    def run(name: str, count: int) -> torch.Tensor:
        def report(step: int, _: int) -> None:
            if on_step is not None:
                on_step(name, done + step, total)

        return sample(
            runners[name], scheduler, noise, guidance_scale, steps=count, schedule=schedule, on_step=report, **conditioning
        )  # fmt: skip

    for name in runners:
        _warm_up(runners[name], inputs)
        done += 2
    for _ in range(rounds):
        for name in runners:
            started = _now(device)
            latents[name] = run(name, steps)
            seconds[name].append(_now(device) - started)
            done += steps
    reference = latents["eager diffusers"]
    rows = []
    for name, runner in runners.items():
        executable = runner if isinstance(runner, Executable) else None
        decibel = psnr(latents[name], reference)
        full = plans["full"].header.macs * 2 * steps
        rows.append(
            DemoRow(
                name=name,
                gmacs=(executable.macs().computed / images if executable else full) / 1e9,
                ms_per_step=1e3 * statistics.median(seconds[name]) / steps,
                speedup=statistics.median(e / s for e, s in zip(seconds["eager diffusers"], seconds[name], strict=True)),
                relative_l2=relative_l2(latents[name], reference),
                psnr=decibel if decibel != float("inf") else None,
                accuracy=shipped.accuracy(latents[name]),
                peak_slot_mb=executable.memory().peak_slot_bytes / 1e6 if executable else 0.0,
            )
        )
    # Glyphs keep the names that they always had.
    stem = "demo" if model_name == "glyph-dit" else f"demo-{model_name}"
    images_of = {name: shipped.pictures(of_runner) for name, of_runner in latents.items()}
    pictures = [_draw_sheets(out, stem, images_of), _draw_difference(out, stem, images_of)]
    for name, plan in plans.items():
        if name != "full":
            path = out / f"{stem}-plan-{name.split()[0].lower()}.png"
            plan.plot(path)
            pictures.append(path)
    return Demo(
        model=model_name,
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        backend=backend,
        scheduler=type(scheduler).__name__.removesuffix("Scheduler"),
        steps=steps,
        images=images,
        guidance_scale=guidance_scale,
        rounds=rounds,
        seed=seed,
        versions={name: importlib.metadata.version(name) for name in ("stepgraph", "torch", "diffusers")},
        rows=tuple(rows),
        pictures=tuple(map(str, pictures)),
    )


def _warm_up(runner: Executable | nn.Module, inputs: dict[str, Any]) -> None:
    """Two evaluations that are not timed: both variants of a plan with period 2."""
    predict = runner.session() if isinstance(runner, Executable) else runner
    with torch.no_grad():
        for _ in range(2):
            predict(**inputs)


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"


def _draw_sheets(out: Path, stem: str, results: Mapping[str, torch.Tensor]) -> Path:
    """The eager model's images and each cached plan's beside them."""
    chosen = {name: images for name, images in results.items() if name != "full"}
    return _draw_panels(out / f"{stem}-images.png", {name: contact_sheet(images) for name, images in chosen.items()})


def _draw_difference(out: Path, stem: str, results: Mapping[str, torch.Tensor], gain: float = 4.0) -> Path:
    """Each plan's difference from the eager model's images, amplified."""
    reference = results["eager diffusers"]
    panels = {
        f"{name}: {gain:g} x |difference|": contact_sheet((gain * (images - reference).abs()).clamp(0, 2) - 1)
        for name, images in results.items()
        if name not in ("eager diffusers", "full")
    }
    return _draw_panels(out / f"{stem}-difference.png", panels)


def _draw_panels(path: Path, panels: Mapping[str, Any]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels), 3.1), layout="constrained")
    for axis, (title, picture) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
    save_figure(path, figure, 130)
    return path


@reports_errors
def demo_command(
    model: Annotated[str, typer.Option(help=f"{' or '.join(SHIPPED)}")] = "glyph-dit",
    out: Out = Path("out"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backend: Backend = "eager",
    steps: Annotated[int | None, typer.Option(min=1, help="number of inference steps; 50, or 28 for flux-emoji")] = None,
    images: Annotated[int, typer.Option(min=1, help="how many images")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="timed rounds; each runs every plan once")] = 3,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Sample a shipped model fully and with two cache plans; print what each costs and write the pictures."""
    with progress_bar("loading", as_json) as report:
        demo = run_demo(
            out, model_name=model, device=parse_device(device), dtype=parse_dtype(dtype), backend=backend, steps=steps,
            images=images, rounds=rounds, seed=seed, on_step=report,
        )  # fmt: skip
    if as_json:
        print(json.dumps(demo.as_dict()))
    else:
        show_demo(demo)


def show_demo(result: Demo) -> None:
    """The demo's table and where its pictures are."""
    # Where there is no terminal to fit into, the table keeps its columns.
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table(
        title=f"{result.model}, {result.scheduler} {result.steps}, {result.images} images, guidance {result.guidance_scale:g}"
    )
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
