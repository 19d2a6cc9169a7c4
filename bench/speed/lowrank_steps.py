"""Milliseconds per step of DiT-XL/2 rows whose linear maps are corrected, reused or computed; random weights and factors.

    python -m stepgraph.bench.speed.lowrank_steps --out out/bench

One run per rank: a step that computes and stores, one that corrects (LOWRANK), one that reuses (REUSE), one that computes and
stores nothing. The steps of a run take turns by nature; what is reported are medians over the rounds and their ratios, next to
the ratio of multiply-accumulates: the speed-up if time were proportional to them.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn

from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_rows
from stepgraph.compiler.entry.load_model import load_model
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.plan import PlanHeader
from stepgraph.plan.factors import Factors
from stepgraph.runtime.executable import Executable

ROWS = {"compute and store": "C", "lowrank": "L", "reuse": "R", "compute": "C"}
INSIDE = (".attn1.", ".ff.")


def random_factors(model: nn.Module, header: PlanHeader, rank: int) -> Factors:
    """Factors of all linear maps in attention and feed-forward modules."""
    generator, maps = torch.Generator().manual_seed(0), {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(part in f".{path}." for part in INSIDE):
            a = torch.randn(module.out_features, rank, generator=generator) * rank**-0.5
            b = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
            maps[path] = (a, b)
    return Factors(header.model, header.fingerprint, header.dtype, "svd", {"rank": rank, "random": True}, maps)


def milliseconds(executable: Executable, inputs: dict[str, Any], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of every row; the first computes the tables of all steps, which the others read."""
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(rounds + 1):
        session = executable.session()
        for name, t in zip(ROWS, executable.plan.header.timesteps, strict=True):
            step_inputs = inputs | {"timestep": torch.full_like(inputs["timestep"], int(t))}
            started = time.perf_counter()
            session(**step_inputs)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - started))
    # The first round warms up.
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Measure and write `lowrank_steps-<device>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dit-xl-2-256")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--batch", type=int, default=2, help="rows of the model's input: guided images count twice")
    parser.add_argument("--ranks", type=int, nargs="*", default=[128, 192, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    model = load_model(f"{arguments.model}:random", arguments.device, getattr(torch, arguments.dtype))
    letters = "".join(ROWS.values())
    plan = make_plan(
        "manual", model=model, scheduler=DDIMScheduler(), steps=len(ROWS), actions={"attn": letters, "ff": letters}
    )
    inputs = {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in example_inputs(model, arguments.batch).items()
    }
    rows = []
    for rank in arguments.ranks:
        factors = random_factors(model, plan.header, rank)
        executable = compile_plan(model, plan, inputs, CompileConfig(arguments.backend), factors)
        times, macs = milliseconds(executable, inputs, arguments.rounds, arguments.device), executable.macs().per_step
        for (name, ms), count, variant in zip(times.items(), macs, executable.default.rows, strict=True):
            speedup, ideal = times["compute"] / ms, macs[-1] / count
            rows.append(
                {
                    "rank": rank, "row": name, "ms": ms, "gmacs": count / 1e9, "speedup": speedup, "ideal": ideal,
                    "share_of_ideal": speedup / ideal, "providers": dict(executable.default.variants[variant].providers),
                }
            )  # fmt: skip
    results = {
        "model": arguments.model, "dtype": arguments.dtype, "backend": arguments.backend, "batch": arguments.batch,
        "rounds": arguments.rounds, "rows": rows,
    }  # fmt: skip
    columns = ("rank", "row", "ms", "gmacs", "speedup", "ideal", "share_of_ideal")
    show_rows(f"{arguments.model}, {arguments.dtype}", rows, columns, ".2f")
    write_record(arguments.out / f"lowrank_steps-{arguments.device.split(':')[0]}.json", arguments.device, results)


if __name__ == "__main__":
    main()
