"""Compile one plan in this process and print what that took as one line of JSON.

    python -m stepgraph.bench.speed.compile_once --plan slow

`bench.speed.runtime` starts it, so that nothing is compiled or cached beforehand but what lies in TORCHINDUCTOR_CACHE_DIR.
"""

import argparse
import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepgraph.bench.speed.books import NAMES, PUBLISHED
from stepgraph.bench.speed.contenders import Setting
from stepgraph.bench.speed.runtime_costs import overheads
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.models import FAMILIES
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.errors import CompileError


def sized_model(name: str, device: str, dtype: torch.dtype, blocks: int = 0, tokens: int = 0) -> nn.Module:
    """A model, or one of a published size (NAME:random) with another number of blocks or tokens; weights are random then.

    Raises:
        CompileError: Another size was asked of a model that is not of random weights.
    """
    if not blocks and not tokens:
        return load_model(name, device, dtype)
    size = name.removesuffix(":random")
    family = next((family for family in FAMILIES if size in family.random), None)
    if family is None or name == size:
        raise CompileError(f"{name} has the size it has; another number of blocks or tokens needs NAME:random")
    changes: dict[str, int] = {"num_layers": blocks} if blocks else {}
    if tokens:
        changes["sample_size"] = round(tokens**0.5) * int(family.random[size]["patch_size"])
    torch.manual_seed(0)
    model = getattr(import_module(family.module), family.classes[0])(**{**family.random[size], **changes})
    placed: nn.Module = nn.Module.to(model, device=device, dtype=dtype).eval()
    return placed


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to plan, to compile and to run the first step; regions and variants."""
    torch.set_grad_enabled(False)
    model = sized_model(
        arguments.model, arguments.device, getattr(torch, arguments.dtype), arguments.blocks, arguments.tokens
    )  # fmt: skip
    scheduler = load_scheduler(arguments.model)
    setting = Setting(model, scheduler, arguments.steps, arguments.batch, arguments.backend, arguments.plans)
    plan, inputs = setting.plan(arguments.plan), example_inputs(model, arguments.batch)
    # The tables of all steps belong to the first one; another timestep would have none.
    inputs["timestep"] = torch.full_like(inputs["timestep"], plan.header.timesteps[0])
    started = time.perf_counter()
    executable = compile_plan(model, plan, inputs, CompileConfig(arguments.backend))
    compiled = time.perf_counter()
    executable.session()(**inputs)
    ready = time.perf_counter()
    figures: dict[str, Any] = {
        "compile_s": compiled - started,
        "first_step_s": ready - compiled,
        "ready_s": ready - started,
        "stages_s": dict(executable.default.seconds),
        "variants": len(executable.default.variants),
        "regions": executable.default.regions,
    }
    if arguments.overhead:
        figures["overhead_us"] = {name: row["median_us"] for name, row in overheads(setting, ("output", "modules"), 2).items()}
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dit-xl-2-256:random")
    parser.add_argument("--plan", choices=NAMES, default="slow")
    parser.add_argument("--plans", type=Path, default=PUBLISHED)
    parser.add_argument("--blocks", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--overhead", type=int, default=0)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
