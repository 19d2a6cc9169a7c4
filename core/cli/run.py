"""`stepgraph run`: samples of a compiled plan or a saved artifact."""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stepgraph.cli.artifact import load_saved
from stepgraph.cli.options import (
    MODEL_HELP,
    Backend,
    Device,
    Dtype,
    FactorsFile,
    Json,
    Out,
    SchedulerName,
    Seed,
    load_factors,
    parse_device,
    parse_dtype,
    progress_bar,
    refuse_strays,
    reports_errors,
    show,
)
from stepgraph.cli.shipped import EMOJI, Shipped, emoji
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.marking.describe import planned_inputs
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.errors import ArgumentError
from stepgraph.files.whole_file import save_tensors, whole_file, writable_folder
from stepgraph.fingerprint import config_of, model_dtype
from stepgraph.inputs import latents_of
from stepgraph.metrics import psnr, relative_l2
from stepgraph.plan import CachePlan
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.sampling.sample import sample


@reports_errors
def run_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=f"{MODEL_HELP}; not for an artifact that has weights")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="flux-emoji only: what to draw, such as 'pizza on mint'; several are drawn in turn")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="the plan file; flux-emoji is computed fully without one")] = None,
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
    if prompt and (model != EMOJI or artifact is not None):
        raise ArgumentError(
            "--prompt is for the model flux-emoji, whose words are known; others are run through their pipeline"
        )
    out = writable_folder(out)
    executable: Executable | None = None
    drawn: Shipped | None = None
    with progress_bar("loading", as_json):
        if plan is None and artifact is not None:
            executable, chosen = load_saved(artifact, model, parse_device(device), scheduler)
            loaded, cache_plan = executable.model, executable.plan
        elif model == EMOJI:
            drawn = emoji(images, parse_device(device), parse_dtype(dtype), seed, prompt or ())
            loaded, chosen = drawn.model, load_scheduler(model, scheduler)
            cache_plan = _full_plan(drawn, chosen) if plan is None else CachePlan.load(plan)
        elif plan is not None and model is not None:
            loaded, cache_plan = load_model(model, parse_device(device), parse_dtype(dtype)), CachePlan.load(plan)
            chosen = load_scheduler(model, scheduler)
        else:
            raise ArgumentError("say what to run: either a model with --plan, or --artifact")
    guided = guidance > 1
    header = cache_plan.header
    traced = TracedModel(loaded)
    rows = images * (2 if guided and header.guidance != "separate" else 1)
    conditioning: dict[str, Any]
    if drawn is not None:
        inputs, conditioning, noise = traced.example_inputs(rows, drawn.inputs), dict(drawn.conditioning), drawn.noise
    else:
        inputs = planned_inputs(loaded, traced.family, header, rows)
        cond, uncond = traced.family.conditioning(config_of(loaded), images, torch.device(device))
        conditioning = cond | {f"negative_{name}": value for name, value in uncond.items()}
        shape = latents_of(inputs).shape[1:]
        noise = torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed)).to(device, model_dtype(loaded))
    if not guided:
        conditioning = {name: value for name, value in conditioning.items() if not name.startswith("negative_")}
    with progress_bar("compiling", as_json) as report:
        if executable is None:
            read = None if plan is None else load_factors(plan, factors)
            executable = compile_plan(loaded, cache_plan, inputs, CompileConfig(backend), read, traced)

        def timed(name: str, runner: Any) -> tuple[torch.Tensor, float]:
            started = time.perf_counter()
            final = sample(
                runner, chosen, noise, guidance, steps=header.steps, schedule=header.schedule,
                on_step=lambda d, t: report(name, d, t), **conditioning,
            )  # fmt: skip
            if final.is_cuda:
                torch.cuda.synchronize()
            return final, time.perf_counter() - started

        latents, seconds = timed("sampling", executable)
        facts: dict[str, Any] = {"seconds": seconds, "written": write_samples(out, latents, drawn)}
        if compare:
            # The runs above and the first eager one warm up; the second of each, one right after the other, are compared.
            timed("eager model", loaded)
            latents, seconds = timed("sampling again", executable)
            reference, eager_seconds = timed("eager model again", loaded)
            facts |= {"seconds": seconds, "eager_seconds": eager_seconds, "speedup": eager_seconds / seconds}
            facts |= {"relative_l2": relative_l2(latents, reference), "psnr": psnr(latents, reference)}
    show(facts, as_json)


def _full_plan(drawn: Shipped, scheduler: Any) -> CachePlan:
    """Everything computed, in as many steps as are usual."""
    return make_plan(
        "full",
        model=drawn.model,
        scheduler=scheduler,
        steps=drawn.steps,
        conditioning=dict(drawn.inputs),
        schedule=drawn.schedule(drawn.steps),
    )


def write_samples(out: Path, latents: torch.Tensor, drawn: Shipped | None = None) -> list[str]:
    """Latents as safetensors, and as a contact sheet where they are images, or a shipped model's."""
    from stepgraph.assets.glyphs import contact_sheet

    paths = [out / "samples.safetensors"]
    save_tensors(paths[0], {"latents": latents.cpu().contiguous()})
    if drawn is not None:
        latents = drawn.pictures(latents)
    if latents.ndim == 4 and latents.shape[1] == 3:
        paths.append(out / "samples.png")
        with whole_file(paths[1]) as partial:
            contact_sheet(latents).save(partial)
    return [str(path) for path in paths]
