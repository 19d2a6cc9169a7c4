"""Sizes of artifacts, and how long a fresh process takes to load them.

    python -m stepgraph.bench.deploy.artifacts --model dit-xl-2-256:random --book invardiff_dit_xl2_50_slow.json

The artifact is saved with and without weights. A fresh process loads it, with the regions that saving it has kept, and runs its
first steps, whose outputs have to be the saving process's to the last bit.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stepgraph.bench.deploy.export import drawn
from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_facts
from stepgraph.compiler.entry.load_artifact import load_artifact
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.planning.import_plan import import_plan
from stepgraph.config import CompileConfig
from stepgraph.runtime.executable import Executable


def main() -> None:
    """Measure and write `artifacts-<model>-cpu.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="glyph-dit")
    parser.add_argument("--book", type=Path, help="a published plan; an interval plan of N=2 unless given")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--checked", type=int, default=3, help="steps that are run and compared")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--load", nargs=3, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--with-model", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load is not None:
        load(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments, Path(folder))
    show_facts(f"artifacts of {arguments.model}, {arguments.dtype}", results)
    write_record(arguments.out / f"artifacts-{arguments.model.partition(':')[0]}-cpu.json", "cpu", results)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Save, load in fresh processes, compare."""
    os.environ["STEPGRAPH_CACHE"] = str(folder / "cache")
    model, scheduler = load_model(arguments.model, "cpu", getattr(torch, arguments.dtype)), load_scheduler(arguments.model)
    if arguments.book is not None:
        plan = import_plan(arguments.book, model, scheduler, steps=arguments.steps)
    else:
        plan = make_plan("interval", model=model, scheduler=scheduler, steps=arguments.steps, every=2)
    started = time.perf_counter()
    executable = compile_plan(model, plan, example_inputs(model, 2), CompileConfig(arguments.backend))
    results: dict[str, Any] = {
        "model": arguments.model, "dtype": arguments.dtype, "steps": arguments.steps, "policy": plan.header.policy,
        "backend": arguments.backend, "variants": len(executable.default.variants), "compile_s": time.perf_counter() - started,
    }  # fmt: skip
    inputs, weights = drawn(executable), {p.data_ptr(): p.nbytes for p in (*model.parameters(), *model.buffers())}
    save_file(inputs, folder / "given.safetensors")
    results["model_bytes"] = sum(weights.values())
    expected = first_outputs(executable, inputs, arguments.checked)
    for form, with_weights in (("plain", False), ("with_weights", True)):
        path, out = folder / f"{form}.zip", folder / f"{form}.safetensors"
        started = time.perf_counter()
        executable.save(path, with_weights=with_weights, scheduler=scheduler)
        results[form] = {"bytes": path.stat().st_size, "save_s": time.perf_counter() - started}
        results[form] |= run_fresh(arguments, [path, folder / "given.safetensors", out], not with_weights)
        outputs = load_file(out)
        if any(not torch.equal(outputs[name], value) for name, value in expected.items()):
            raise SystemExit("what was loaded computes something else: no figure is worth printing")
    return results | {"checked_steps": arguments.checked}


def first_outputs(executable: Executable, inputs: dict[str, torch.Tensor], steps: int) -> dict[str, torch.Tensor]:
    """The model's outputs at the first steps, for one and the same latents."""
    session, outputs = executable.session(), {}
    for step, t in enumerate(executable.plan.header.timesteps[:steps]):
        timestep = torch.full((executable.default.batch,), t).to(example_inputs(executable.model)["timestep"].dtype)
        outputs[str(step)] = session(**inputs, timestep=timestep, return_dict=False)[0].contiguous()
    return outputs


def run_fresh(arguments: argparse.Namespace, paths: list[Path], with_model: bool) -> dict[str, float]:
    """Seconds and peak memory of loading in a new process."""
    command = [sys.executable, "-m", "stepgraph.bench.deploy.artifacts", "--model", arguments.model, "--dtype", arguments.dtype]
    command += ["--checked", str(arguments.checked), *(["--with-model"] if with_model else []), "--load", *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"the process that loads failed:\n{result.stderr}")
    seconds: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return seconds


def load(arguments: argparse.Namespace) -> None:
    """The fresh process: its own model, where the artifact has no weights, is there before the clock starts."""
    path, inputs_file, out = arguments.load
    model = load_model(arguments.model, "cpu", getattr(torch, arguments.dtype)) if arguments.with_model else None
    started = time.perf_counter()
    executable = load_artifact(path, model)
    loaded = time.perf_counter()
    inputs = load_file(inputs_file)
    first_outputs(executable, inputs, 1)
    first = time.perf_counter()
    save_file(first_outputs(executable, inputs, arguments.checked), out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"load_s": loaded - started, "first_step_s": first - loaded, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
