"""What a compiled plan costs beside its arithmetic: calls that compute nothing, compilation, stored bytes."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stepgraph.bench.speed.contenders import Setting
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.errors import CompileError
from stepgraph.plan import CachePlan
from stepgraph.plan.liveness import bytes_of, traffic

# What is reused at every step but the first: the model's output; the tokens after the last block; every module.
REUSED = {"output": ("output",), "hidden": ("hidden",), "modules": ("attn", "ff")}
# One at a time is varied; the first of each is the usual one.
SCALES: dict[str, Sequence[int]] = {
    "tokens": (256, 1024, 4096), "blocks": (28, 14, 7), "steps": (50, 10, 20, 100), "batch": (2, 1, 4, 8),
}  # fmt: skip


@torch.no_grad()
def overheads(setting: Setting, names: Sequence[str] = tuple(REUSED), rounds: int = 5, least: int = 20) -> dict[str, Any]:
    """Microseconds of a call in which every site of a kind is reused: median over the steps, and the fastest.

    Args:
        setting: Its steps are raised to `least`.
        names: Of `REUSED`.
        rounds: Sampling runs.
        least: Fewest steps of a run.
    """
    steps, inputs, figures = max(setting.steps, least), example_inputs(setting.model, setting.batch), {}
    for name in names:
        actions = dict.fromkeys(REUSED[name], "C" + "R" * (steps - 1))
        plan = make_plan("manual", model=setting.model, scheduler=setting.scheduler, steps=steps, actions=actions)
        executable = compile_plan(setting.model, plan, inputs, CompileConfig(setting.backend))
        seconds: list[float] = []
        # With other timesteps than the plan's, tables would be computed in every call.
        timesteps = [torch.full_like(inputs["timestep"], t) for t in plan.header.timesteps]
        for _ in range(rounds):
            session = executable.session()
            session(**{**inputs, "timestep": timesteps[0]}, return_dict=False)
            for timestep in timesteps[1:]:
                step_inputs = {**inputs, "timestep": timestep}
                started = time.perf_counter()
                session(**step_inputs, return_dict=False)
                if next(setting.model.parameters()).is_cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
        figures[name] = {"median_us": 1e6 * statistics.median(seconds), "least_us": 1e6 * min(seconds), "calls": len(seconds)}
    return figures


def memory(plan: CachePlan, batch: int) -> dict[str, Any]:
    """Bytes that a plan's stored values take, at their peak and over time, beside storing every module output always.

    A tensor-step is one stored value held during one step, the step that stores it and the last that reads it included.
    """
    modules = [site for site in plan.sites if site.kind in ("attn", "cross_attn", "ff", "hidden")]
    held: set[Any] = set()
    tensor_steps = byte_steps = peak = 0
    for step in traffic(plan):
        held |= set(step.stores)
        size = sum(bytes_of(plan, stored) for stored in held)
        tensor_steps, byte_steps, peak = tensor_steps + len(held), byte_steps + size, max(peak, size)
        held -= set(step.frees)
    always = sum(site.bytes for site in modules)
    return {
        "tensor_steps": tensor_steps, "tensor_steps_always": len(modules) * plan.steps,
        "byte_steps": byte_steps * batch, "byte_steps_always": always * plan.steps * batch,
        "share": byte_steps / (always * plan.steps), "peak_bytes": peak * batch, "peak_bytes_always": always * batch,
    }  # fmt: skip


def in_fresh_process(arguments: Mapping[str, Any], cache: str) -> dict[str, Any]:
    """What `bench.speed.compile_once` measures, with the disk caches of inductor and stepgraph in a folder.

    Raises:
        CompileError: The process failed; the message has the end of what it said.
    """
    options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "stepgraph.bench.speed.compile_once", *options],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "STEPGRAPH_CACHE": str(Path(cache) / "stepgraph")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise CompileError(f"compile_once {' '.join(options)} failed: {done.stderr.strip()[-500:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def cold_and_warm(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Compilation in a fresh process with an empty disk cache, and in a second one after it."""
    with tempfile.TemporaryDirectory() as cache:
        return {name: in_fresh_process(arguments, cache) for name in ("cold", "warm")}


def scaled(usual: Mapping[str, Any], scales: Mapping[str, Sequence[int]] = SCALES) -> Iterator[dict[str, Any]]:
    """Cold compile seconds and overhead per step, with one size varied at a time."""
    done: dict[str, Any] | None = None
    for what, values in scales.items():
        for index, value in enumerate(values):
            if index == 0 and done is not None:
                yield {"varied": what, "value": value, **done}
                continue
            changed = {name: sizes[0] for name, sizes in scales.items()} | {what: value}
            with tempfile.TemporaryDirectory() as cache:
                row = in_fresh_process({**usual, **changed, "overhead": 1}, cache)
            done = row if index == 0 else done
            yield {"varied": what, "value": value, **row}
