"""Everything that happens once, before it is waited for: kernels are loaded and tuned, work is captured, memory is taken."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepgraph.env import get_logger
from stepgraph.errors import ArgumentError
from stepgraph.inputs import timestep_key
from stepgraph.runtime.program.program import zero_inputs
from stepgraph.runtime.sampling.captured_run import CapturedRun
from stepgraph.runtime.sampling.sample import sample
from stepgraph.runtime.session.compiled import Compiled
from stepgraph.runtime.session.lease_captured_steps import wants_graphs
from stepgraph.schedule import timestep_of
from stepgraph.scheduler import latents_name
from stepgraph.tuning import tuning


@dataclass(frozen=True)
class WarmedUp:
    """What warming up took.

    Attributes:
        seconds: Until the last kernel was done.
        bytes: By which the device's memory that torch holds has grown; on a CPU, what a run takes for stored values and tables.
        captured: "run" where whole runs are replayed from now on, "steps" where the calls of variants are, else empty.
    """

    seconds: float
    bytes: int
    captured: str


def warm_up(executable: Compiled, scheduler: Any, guidance_scale: float | None, inputs: Mapping[str, Any]) -> WarmedUp:
    """See `Executable.warm_up`."""
    device = next(executable.model.parameters()).device
    started, before = time.perf_counter(), _held(device)
    # What is captured from the second use on is captured by the second.
    passes = 2 if executable.config.cuda_graphs is None and wants_graphs(executable.config, device) else 1
    with tuning():
        for _ in range(passes):
            if scheduler is None:
                _run_steps(executable, inputs, device)
            else:
                _run_whole(executable, scheduler, guidance_scale, inputs, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    memory = executable.memory()
    grown = _held(device) - before if device.type == "cuda" else memory.arena_bytes + memory.table_bytes
    warmed = WarmedUp(time.perf_counter() - started, grown, _captured(executable))
    get_logger("executable").info(
        "warmed up in %.1f s, %.1f MB more: %s, of which captures hold %.1f MB beside their scratch",
        warmed.seconds, warmed.bytes / 1e6, warmed.captured or "no graphs", executable.captured.nbytes / 1e6,
    )  # fmt: skip
    return warmed


def _held(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _captured(executable: Compiled) -> str:
    captures = executable.captured.captures()
    if any(isinstance(capture, CapturedRun) for capture in captures):
        return "run"
    return "steps" if captures else ""


def _run_steps(executable: Compiled, inputs: Mapping[str, Any], device: torch.device) -> None:
    """One run of the plan, call by call, as pipelines and sessions make them."""
    example = {**zero_inputs(executable.example or {}, device), **inputs}
    name, of_step = latents_name(executable.model), timestep_key(example) or "timestep"
    if not isinstance(example.get(name), torch.Tensor) or not isinstance(example.get(of_step), torch.Tensor):
        raise ArgumentError(f"the executable has no example of {name} and {of_step} that are tensors; pass the model's inputs")
    session = executable.session()
    convert = executable.plan.header.timestep or timestep_of(executable.model)
    every = convert(torch.tensor(session.timesteps, device=device), example[name].dtype).to(example[of_step].dtype)
    while not session.finished:
        session(**{**example, of_step: every[session.step].expand(example[of_step].shape)})


def _run_whole(
    executable: Compiled, scheduler: Any, guidance_scale: float | None, inputs: Mapping[str, Any], device: torch.device
) -> None:
    """One run of `sample`."""
    header = executable.plan.header
    if guidance_scale is None and header.guidance != "none":
        raise ArgumentError("guidance_scale is missing: the plan is for guidance, and the graph of a run is for one scale")
    scale = 1.0 if guidance_scale is None else guidance_scale
    example = zero_inputs(executable.example or {}, device)
    latents = example.pop(latents_name(executable.model), None)
    example.pop(timestep_key(example) or "", None)
    noise = inputs.get("noise", latents)
    if noise is None:
        raise ArgumentError("the executable has no example of latents; pass noise")
    if noise is latents and header.guidance == "batched":
        noise = noise[: noise.shape[0] // 2]
    rows = noise.shape[0]
    shared = {name: value[:rows] if isinstance(value, Tensor) and value.ndim else value for name, value in example.items()}
    conditioning = {**shared, **{name: value for name, value in inputs.items() if name != "noise"}}
    if scale > 1:
        wanted = {name: value for name, value in conditioning.items() if not name.startswith("negative_")}
        conditioning = {**{f"negative_{name}": value for name, value in wanted.items()}, **conditioning}
    sample(executable, scheduler, noise, scale, **conditioning)
