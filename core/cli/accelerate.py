"""`stepgraph accelerate`: any diffusers pipeline of a folder, accelerated from its own call."""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stepgraph.cli.options import (
    Arguments,
    Backend,
    Device,
    Dtype,
    Json,
    Out,
    Seed,
    parse_arguments,
    parse_device,
    parse_dtype,
    progress_bar,
    reports_errors,
    show,
)
from stepgraph.compiler.entry.accelerate import accelerate
from stepgraph.compiler.entry.load_model import load_pipeline
from stepgraph.errors import ArgumentError
from stepgraph.files.whole_file import whole_file, writable_folder
from stepgraph.metrics import relative_l2

# What the command gives the call itself.
RESERVED = ("generator", "return_dict")


@reports_errors
def accelerate_command(
    pipeline: Annotated[str, typer.Argument(help="a folder that a diffusers pipeline was saved to, or a hub id")],
    prompt: Annotated[str | None, typer.Option(help="what the pipeline is to draw")] = None,
    call: Annotated[
        list[str] | None,
        typer.Option("--call", help="further arguments of its call as name=value, the value as JSON: --call height=768"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="number of inference steps; the pipeline's usual unless given")] = None,
    policy: Annotated[str, typer.Option(help="one that measures nothing: interval, full, ...")] = "interval",
    arg: Arguments = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backend: Backend = "inductor",
    compare: Annotated[bool, typer.Option(help="run the eager pipeline too, and report the difference")] = False,
    out: Out = Path("out"),
    as_json: Json = False,
) -> None:
    """Watch a pipeline's call, plan, compile and attach, and run the call; write what it draws.

    The first run, which compiles what is left, warms up; the second one is timed.
    """
    out = writable_folder(out)
    said: dict[str, Any] = {"prompt": prompt, "num_inference_steps": steps, "output_type": "np"}
    ours = {name: value for name, value in said.items() if value is not None}
    given = parse_arguments(call)
    twice = sorted(given.keys() & {*ours, *RESERVED})
    if twice:
        raise ArgumentError(f"--call {twice[0]}=... is said by another option, or by the command itself; leave it out")
    given |= ours
    with progress_bar("loading", as_json):
        pipe = load_pipeline(pipeline, parse_device(device), parse_dtype(dtype))
    pipe.set_progress_bar_config(disable=as_json)

    def timed() -> tuple[torch.Tensor, float]:
        pipe(**given, generator=torch.Generator().manual_seed(seed))
        started = time.perf_counter()
        made = pipe(**given, generator=torch.Generator().manual_seed(seed))
        seconds = time.perf_counter() - started
        return torch.as_tensor(made.frames if hasattr(made, "frames") else made.images), seconds

    begun = time.perf_counter()
    with progress_bar("watching and compiling", as_json):
        executable = accelerate(pipe, None, policy, parse_arguments(arg), call=given, backend=backend)
    compiled = time.perf_counter() - begun
    pictures, seconds = timed()
    header = executable.plan.header
    facts: dict[str, Any] = {
        "steps": header.steps, "calls_a_step": len(header.branches), "ideal_speedup": executable.macs().ideal_speedup,
        "compile_seconds": compiled, "seconds": seconds,
    }  # fmt: skip
    executable.detach()
    if compare:
        wanted, eager = timed()
        facts |= {"eager_seconds": eager, "speedup": eager / seconds, "relative_l2": relative_l2(pictures, wanted)}
    show({**facts, "written": write_pictures(out, pictures)}, as_json)


def write_pictures(out: Path, pictures: torch.Tensor) -> list[str]:
    """Images [B, H, W, 3] in 0..1 as PNG, videos [B, F, H, W, 3] as GIF."""
    from PIL import Image

    written = []
    for number, one in enumerate((pictures.float().clamp(0, 1) * 255).round().byte().numpy()):
        frames = [Image.fromarray(frame) for frame in (one if one.ndim == 4 else one[None])]
        path = out / f"accelerated-{number}.{'gif' if one.ndim == 4 else 'png'}"
        with whole_file(path) as partial:
            more = {"save_all": True, "append_images": frames[1:], "duration": 125, "loop": 0} if one.ndim == 4 else {}
            frames[0].save(partial, path.suffix.removeprefix("."), **more)
        written.append(str(path))
    return written
