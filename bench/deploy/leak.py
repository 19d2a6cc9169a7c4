"""Memory of a process over many generations: the resident pages, and the tensors that are alive.

    python -m stepgraph.bench.deploy.leak --out bench/results

Generations of glyph-dit on one executable, each with a session of its own, other noise and other classes; every eighth is
cancelled half-way by an exception. Memory that grows from generation to generation shows as a slope.
"""

import argparse
import gc
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from stepgraph.assets.glyphs import NULL_CLASS
from stepgraph.bench.record import write_record
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.files.whole_file import save_figure
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.sampling.sample import sample

INK, ACCENT, PALE = "#1b3a5c", "#f2b134", "#c9d3dd"
# Of so many generations, one is cancelled.
CANCELLED = 8


@dataclass(frozen=True)
class Reading:
    """A process after some generations.

    Attributes:
        generation: How many have run.
        resident_bytes: Of the process.
        tensors: How many torch tensors Python holds.
        tensor_bytes: Their sizes; tensors that share memory count each.
    """

    generation: int
    resident_bytes: int
    tensors: int
    tensor_bytes: int


class CancelledError(Exception):
    """A generation that is given up."""


def read_memory(generation: int) -> Reading:
    """This process now, after a garbage collection; Linux only."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return Reading(generation, pages * os.sysconf("SC_PAGE_SIZE"), len(tensors), sum(tensor.nbytes for tensor in tensors))


def watch(generate: Callable[[int], Any], generations: int, every: int) -> list[Reading]:
    """Readings after the first generation and after every so many; `generate` is called with the generation's number."""
    readings = []
    for generation in track(range(1, generations + 1), description="generations", transient=True, console=Console(stderr=True)):
        generate(generation)
        if generation == 1 or generation % every == 0:
            readings.append(read_memory(generation))
    return readings


def growth(readings: Sequence[Reading]) -> float:
    """Bytes by which the process grows per generation: the slope of a line through the second half of the readings."""
    later = readings[len(readings) // 2 :]
    return float(np.polyfit([r.generation for r in later], [r.resident_bytes for r in later], 1)[0])


def generate(executable: Executable, scheduler: Any, seed: int, batch: int) -> torch.Tensor | None:
    """One generation, with guidance; None for the eighth, which is cancelled half-way."""
    config: Any = executable.model.config
    size, generator = config.sample_size, torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, config.in_channels, size, size, generator=generator)
    classes = torch.randint(NULL_CLASS, (batch,), generator=generator)

    def on_step(done: int, steps: int) -> None:
        if seed % CANCELLED == 0 and 2 * done >= steps:
            raise CancelledError

    conditioning: dict[str, Any] = {"class_labels": classes, "negative_class_labels": torch.full((batch,), NULL_CLASS)}
    with suppress(CancelledError):
        return sample(executable, scheduler, noise, 2.0, on_step=on_step, **conditioning)
    return None


def plot(readings: Sequence[Reading], latent: int, path: Path) -> None:
    """Resident memory since the first generation, beside what a leak of one latent each would make of it, and live tensors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    generations, first = [reading.generation for reading in readings], readings[0].resident_bytes
    upper.plot(generations, [(reading.resident_bytes - first) / 1e6 for reading in readings], color=INK, label="resident")
    leak = [generation * latent / 1e6 for generation in generations]
    upper.plot(generations, leak, "--", color=PALE, label="if one latent were kept per generation")
    upper.set_ylabel(f"MB above the first {first / 1e6:.0f}")
    upper.set_title(f"glyph-dit, {generations[-1]} generations", loc="left", fontsize=10)
    upper.legend(frameon=False, fontsize=8)
    lower.plot(generations, [reading.tensors for reading in readings], color=ACCENT)
    lower.set_ylabel("live tensors")
    lower.set_xlabel("generations")
    lower.set_ylim(bottom=0)
    save_figure(path, figure)


def main() -> None:
    """Measure, print and write `leak-cpu.json` and `leak-cpu.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--every", type=int, default=5, help="generations between two readings")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--backend", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    model, scheduler = load_model("glyph-dit"), load_scheduler("glyph-dit", "ddim")
    plan = make_plan("interval", model=model, scheduler=scheduler, steps=arguments.steps, every=2)
    executable = compile_plan(model, plan, example_inputs(model, 2 * arguments.batch), CompileConfig(arguments.backend))
    readings = watch(
        lambda seed: generate(executable, scheduler, seed, arguments.batch), arguments.generations, arguments.every
    )
    config: Any = model.config
    latent = arguments.batch * config.in_channels * config.sample_size**2 * 4
    facts: dict[str, Any] = {
        "model": "glyph-dit", "plan": "interval, every 2", "steps": arguments.steps, "batch": arguments.batch,
        "backend": arguments.backend, "generations": arguments.generations, "cancelled": arguments.generations // CANCELLED,
        "growth_bytes_per_generation": growth(readings),
        "latent_bytes": latent,
        "arena_bytes": executable.memory().arena_bytes,
        "readings": [asdict(reading) for reading in readings],
    }  # fmt: skip
    write_record(arguments.out / "leak-cpu.json", "cpu", facts)
    plot(readings, latent, arguments.out / "leak-cpu.png")
    print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "readings"))


if __name__ == "__main__":
    main()
