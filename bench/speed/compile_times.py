"""How long full-size DiT-XL/2 takes to trace, specialise and sample once; random weights.

    python -m stepgraph.bench.speed.compile_times --out out/bench

The specialised graphs are first checked against the eager model: an all-COMPUTE step must be bit-equal.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_facts
from stepgraph.compiler.entry.load_model import load_model
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.marking.traced_model import marked_graph
from stepgraph.compiler.models.dit import DIT
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.tracing.trace import trace
from stepgraph.config import CompileConfig
from stepgraph.fingerprint import model_dtype
from stepgraph.runtime.sampling.sample import sample

Result = TypeVar("Result")


def seconds_of(action: Callable[[], Result], device: str) -> tuple[float, Result]:
    """Seconds and result of calling `action`."""
    started = time.perf_counter()
    result = action()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def main() -> None:
    """Measure and write `compile_times-<device>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    results: dict[str, object] = {
        "model": "dit-xl-2-256",
        "blocks": 28,
        "dtype": arguments.dtype,
        "steps": arguments.steps,
    }
    with torch.device("meta"):
        empty = DiTTransformer2DModel(**DIT.random["dit-xl-2-256"]).eval()
    results["trace_without_weights_s"] = trace(empty, example_inputs(empty, 2)).seconds
    results["trace_and_mark_without_weights_s"], _ = seconds_of(lambda: marked_graph(empty, example_inputs(empty, 2)), "cpu")
    results["load_s"], model = seconds_of(lambda: load_model("dit-xl-2-256:random", device, dtype), device)
    scheduler = DDIMScheduler()
    results["plan_s"], plan = seconds_of(
        lambda: make_plan("interval", model=model, scheduler=scheduler, steps=arguments.steps, every=arguments.every),
        device,
    )
    inputs = example_inputs(model, 2)
    compiled_s, executable = seconds_of(
        lambda: compile_plan(model, plan, inputs, CompileConfig("eager", exact=True)),
        device,
    )
    results["compile_s"], results["compile_stages_s"] = compiled_s, dict(executable.default.seconds)
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(device, model_dtype(model))
    inputs["hidden_states"] = torch.cat([noise, noise])
    with torch.no_grad():
        model(**inputs)
        results["eager_step_s"], expected = seconds_of(lambda: model(**inputs).sample, device)
    results["first_step_s"], output = seconds_of(lambda: executable.session()(**inputs).sample, device)
    if not torch.equal(output, expected):
        raise SystemExit("the compiled first step differs from the eager model: no figure is worth printing")
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    conditioning: dict[str, Any] = {"class_labels": labels, "negative_class_labels": labels + 1000}
    results["first_sample_s"], _ = seconds_of(lambda: sample(executable, scheduler, noise, 4.0, **conditioning), device)
    results["variants"] = len(executable.default.variants)
    results["nodes_per_variant"] = [len(v.graph.graph.nodes) for v in executable.default.variants]
    results["ideal_speedup"] = executable.macs().ideal_speedup
    show_facts("DiT-XL/2-256, random weights, 2 rows", results, ".3f")
    write_record(arguments.out / f"compile_times-{device.split(':')[0]}.json", device, results)


if __name__ == "__main__":
    main()
