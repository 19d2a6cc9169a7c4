"""Sizes and times of pt2, AOTInductor and ONNX exports, and whether a process without stepgraph makes the same of them.

    python -m stepgraph.bench.deploy.export --model dit-xl-2-256:random --book invardiff_dit_xl2_50_slow.json --dtype bfloat16

A fresh process loads the export with torch alone (ONNX: and onnxruntime) and runs its first steps; its outputs are compared
with the executable's before anything is printed.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_facts
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.forecast.correct_plan import forecast, lowrank
from stepgraph.compiler.lowrank.factorize import factorize
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.planning.import_plan import import_plan
from stepgraph.config import CompileConfig
from stepgraph.fingerprint import dtype_name
from stepgraph.metrics import relative_l2
from stepgraph.plan import CachePlan
from stepgraph.plan.factors import Factors
from stepgraph.runtime.executable import Executable
from stepgraph.tolerances import EXPORTED_RUN

TOLERANCES = {dtype_name(dtype): most for dtype, most in EXPORTED_RUN.items() if dtype is not None}
# Rank of the low-rank maps of corrected plans.
RANK = 8
# The fresh process: the folders to import from, the export, the inputs, where the outputs go, and how many steps.
FRESH = """
import os, sys, time
started = time.perf_counter()
sites, folder, given, out, steps = sys.argv[1:]
sys.path[:0] = [folder, *sites.split(os.pathsep)]
sys.modules.update(dict.fromkeys(["stepgraph", "diffusers", "safetensors"]))
import json
import torch
import run
imported = time.perf_counter()
run.Runner(folder, verify=False)
opened = time.perf_counter()
runner = run.Runner(folder)
verified = time.perf_counter()
for name in runner.schedule["programs"]:
    runner.load(name)
loaded = time.perf_counter()
inputs, session, outputs = run.read_tensors(given), runner.session(), {}
latents = inputs.pop(runner.schedule["inputs"][0]["name"])
for step in range(int(steps)):
    outputs[str(step)] = session(latents, runner.schedule["steps"][step]["timestep"], inputs)
    if not step:
        first = time.perf_counter()
run.write_tensors(out, outputs)
print(json.dumps({"import_torch_s": imported - started, "weights_s": opened - imported, "verified_weights_s": verified - opened,
                  "programs_s": loaded - verified, "first_step_s": first - loaded}))
"""


def main() -> None:
    """Measure and write `export[-<format>][-corrected]-<model>-<device>.json`; without a format for pt2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="glyph-dit")
    parser.add_argument("--format", default="pt2", choices=("pt2", "aoti", "onnx"))
    parser.add_argument("--book", type=Path, help="a published plan; an interval plan of N=2 unless given")
    parser.add_argument("--corrected", action="store_true", help="a plan of COMPUTE, REUSE, LOWRANK and FORECAST")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--checked", type=int, default=6, help="steps that are run and compared")
    parser.add_argument("--dtype", default="float32", choices=sorted(TOLERANCES))
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    model = load_model(arguments.model, torch.device("cpu"), getattr(torch, arguments.dtype))
    scheduler = load_scheduler(arguments.model)
    plan, factors = chosen_plan(arguments, model, scheduler)
    exe = compile_plan(model, plan, example_inputs(model, 2), CompileConfig("eager"), factors)
    with tempfile.TemporaryDirectory() as folder:
        results = {"model": arguments.model, "dtype": arguments.dtype, "steps": arguments.steps, "policy": plan.header.policy}
        results["actions"] = "".join(sorted({letter for row in plan.rows for letter in row}))
        results |= measure(exe, scheduler, Path(folder), arguments.checked, arguments.format)
    if results["relative_l2"] > TOLERANCES[arguments.dtype]:
        raise SystemExit(f"the export differs by {results['relative_l2']:.2g}: no figure is worth printing")
    show_facts(f"{arguments.format} export of {arguments.model}, {arguments.dtype}", results)
    kind = (f"-{arguments.format}" if arguments.format != "pt2" else "") + ("-corrected" if arguments.corrected else "")
    write_record(arguments.out / f"export{kind}-{arguments.model.partition(':')[0]}-cpu.json", "cpu", results)


def chosen_plan(arguments: argparse.Namespace, model: nn.Module, scheduler: Any) -> tuple[CachePlan, Factors | None]:
    """The plan that the command line asks for, with its factors."""
    if arguments.book is not None:
        return import_plan(arguments.book, model, scheduler, steps=arguments.steps), None
    if arguments.corrected:
        return corrected_plan(model, scheduler, arguments.steps)
    return make_plan("interval", model=model, scheduler=scheduler, steps=arguments.steps, every=2), None


def corrected_plan(model: nn.Module, scheduler: Any, steps: int) -> tuple[CachePlan, Factors]:
    """Every second step: feed-forwards LOWRANK, the first attention FORECAST and the others REUSE."""
    plan = make_plan("interval", model=model, scheduler=scheduler, steps=steps, every=2, kinds=["attn", "ff"])
    plan = lowrank(plan, kinds=["ff"])
    plan = forecast(plan, sites=[next(site.name for site in plan.sites if site.kind == "attn")])
    factors = factorize(model, method="svd", rank=RANK)
    return replace(plan, header=replace(plan.header, factors=factors.digest)), factors


def measure(exe: Executable, scheduler: Any, folder: Path, checked: int, format: str = "pt2") -> dict[str, Any]:
    """Export, load in a fresh process, and compare the outputs of the first steps."""
    started = time.perf_counter()
    target = exe.export(folder / "export", format, scheduler=scheduler)
    results: dict[str, Any] = {"export_s": time.perf_counter() - started, **sizes(target)}
    weights = {p.data_ptr(): p.nbytes for p in (*exe.model.parameters(), *exe.model.buffers())}
    results |= {"model_bytes": sum(weights.values()), "variants": len(exe.default.variants)}
    inputs = drawn(exe)
    save_file(inputs, folder / "given.safetensors")
    results |= run_fresh(target, folder / "given.safetensors", folder / "outputs.safetensors", checked)
    outputs, session = load_file(folder / "outputs.safetensors"), exe.session()
    errors = []
    for step, t in enumerate(exe.plan.header.timesteps[:checked]):
        timestep = torch.full((exe.default.batch,), t).to(example_inputs(exe.model)["timestep"].dtype)
        wanted = session(**inputs, timestep=timestep, return_dict=False)[0]
        errors.append(relative_l2(outputs[str(step)], wanted))
    return results | {"checked_steps": checked, "relative_l2": max(errors)}


def drawn(exe: Executable) -> dict[str, torch.Tensor]:
    """Random latents, and the model's other inputs as its family has them, without the timestep."""
    inputs = {n: v for n, v in example_inputs(exe.model, exe.default.batch).items() if isinstance(v, torch.Tensor)}
    latents = next(iter(inputs))
    inputs[latents] = torch.randn(inputs[latents].shape, generator=torch.Generator().manual_seed(0)).to(inputs[latents].dtype)
    return {name: value for name, value in inputs.items() if name != "timestep"}


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the weights, of the programs and of all but the weights."""
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    weights = files[folder / "weights.safetensors"]
    programs = sum(size for path, size in files.items() if path.parent.name == "programs")
    return {"weights_file_bytes": weights, "program_bytes": programs, "bytes_without_weights": sum(files.values()) - weights}


def run_fresh(folder: Path, inputs: Path, out: Path, steps: int) -> dict[str, float]:
    """Seconds of loading in a process that has torch alone, and onnxruntime where it is installed."""
    runtime = importlib.util.find_spec("onnxruntime")
    origins = [torch.__file__, *([runtime.origin] if runtime is not None and runtime.origin is not None else [])]
    sites = os.pathsep.join(dict.fromkeys(str(Path(origin).parents[1]) for origin in origins))
    command = [sys.executable, "-I", "-S", "-c", FRESH, sites, folder, inputs, out, steps]
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"the process without stepgraph failed:\n{process.stderr}")
    seconds: dict[str, float] = json.loads(process.stdout)
    return seconds


if __name__ == "__main__":
    main()
