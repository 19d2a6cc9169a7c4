"""Whole runs of DiT-XL/2 and FLUX.1-dev for `bench/gpu_suite.sh prove`: eager, compiled by others, and ours.

    python -m stepgraph.bench.speed.prove_models dit1 out/rows.jsonl --device cuda

Every row is written as soon as it is measured. A row that fails, or whose result is off, is written with the reason and without
a figure, and the others go on.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from stepgraph.bench.rows import Rows, write_all
from stepgraph.bench.speed.books import gates
from stepgraph.bench.speed.contenders import macs_of
from stepgraph.bench.speed.hook_runtime import sharing_weights
from stepgraph.bench.speed.launches import launches
from stepgraph.bench.speed.peer_cache_dit import CacheDit
from stepgraph.bench.speed.prove_work import Work, dit, flux
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.errors import CompileError
from stepgraph.fingerprint import fingerprint
from stepgraph.metrics import relative_l2
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.sampling.sample import sample
from stepgraph.schedule import timestep_of
from stepgraph.tolerances import FIRST_STEP, REPLAY, tolerance

Row = tuple[str, dict[str, Any]]


class Measuring:
    """The rows of a part; with `build_only` everything is built and run once, and nothing is timed."""

    def __init__(self, work: Work, build_only: bool) -> None:
        self.work, self.build_only = work, build_only
        self.ceiling: float | None = None

    def _run(self, runner: Any, **options: Any) -> torch.Tensor:
        work = self.work
        options |= work.conditioning
        if not isinstance(runner, Executable):
            options["steps"] = work.steps
        return sample(runner, work.scheduler, work.noise, work.scale, **options)

    def seconds(self, run: Callable[[], torch.Tensor], most: float = 8.0) -> dict[str, Any]:
        """Seconds of a call: the best of up to three begun within `most` seconds, after one that warms up."""
        warm, latents = _timed(run)
        if self.build_only:
            return {"warm_s": warm}
        begun, times = time.perf_counter(), list[float]()
        while not times or (len(times) < 3 and time.perf_counter() - begun < most):
            spent, latents = _timed(run)
            times.append(spent)
        if not latents.isfinite().all():
            raise CompileError("the latents are not finite")
        best = min(times)
        return {"seconds": best, "of": len(times), "ms_per_step": 1e3 * best / self.work.steps, "warm_s": warm}

    def eager(self) -> Iterator[Row]:
        """The model as it is."""
        yield "eager", self.seconds(lambda: self._run(self.work.model))

    def regional(self) -> Iterator[Row]:
        """Each kind of block compiled, as diffusers does it."""
        model: Any = sharing_weights(self.work.model)
        model._repeated_blocks = self.work.repeated
        model.compile_repeated_blocks(fullgraph=True, dynamic=False, disable=self.work.tiny)
        yield "regional", self.seconds(lambda: self._run(model))

    def step_mask(self) -> Iterator[Row]:
        """cache-dit with the slow book's step gate."""
        if find_spec("cache_dit") is None:
            yield "cache-dit mask", {"absent": "cache-dit is not installed"}
            return
        work = self.work
        letters = gates(work.steps, work.plans) if work.plans is not None else ("CRR" * work.steps)[: work.steps]
        runner = CacheDit(work.model, [letter == "C" for letter in letters], regional=not work.tiny)
        yield "cache-dit mask", {"mask": letters, **self.seconds(lambda: self._run(runner.start()))}

    def ours(self, name: str, loop: bool = True) -> Iterator[Row]:
        """A plan: ready to run, the loop with every kernel launched, and the whole run as one graph."""
        work, begun = self.work, time.perf_counter()
        plan, words = work.plan(name)
        planned = time.perf_counter()
        executable = compile_plan(work.model, plan, work.inputs, work.config)
        compiled = time.perf_counter()
        error = self._first_step(executable)
        ideal = plan.header.macs * len(plan.rows) / sum(macs_of(plan))
        yield f"ours {name}", {
            "plan": words, "plan_s": planned - begun, "compile_s": compiled - planned, "ideal": ideal,
            "first_step_error": error, "ready_s": time.perf_counter() - begun, "stages_s": dict(executable.default.seconds),
            "regions": executable.default.regions, "variants": len(executable.default.variants),
        }  # fmt: skip
        run = partial(self._run, executable)
        expected = run(capture=False)
        if loop:
            yield f"ours {name}, loop", self.seconds(lambda: run(capture=False))
        capture = work.noise.is_cuda
        stand_in = {} if capture else {"stand_in": "the loop: there are no graphs on a CPU"}
        figures = self.seconds(lambda: run(capture=capture), 4.0)
        got = run(capture=capture)
        apart, most = relative_l2(got, expected), tolerance(REPLAY, got.dtype)
        if not apart <= most:
            raise CompileError(f"the graph of {name} is {apart:.2e} from its loop, more than {most:g}")
        if name == "full" and not self.build_only:
            figures |= launches(lambda: run(capture=capture), work.steps)
            if self.ceiling:
                rows = len(work.inputs["timestep"])
                figures["share"] = 2 * plan.header.macs * rows * len(plan.rows) / figures["seconds"] / self.ceiling
        yield f"ours {name}, graph", {"plan": words, "error": apart, **stand_in, **figures}

    def _first_step(self, executable: Executable) -> float:
        """Distance of the model's output at the first step, where everything is computed, from the eager model's."""
        inputs = dict(self.work.inputs)
        first = torch.tensor(executable.plan.header.timesteps[0])
        timestep = timestep_of(self.work.model)(first, self.work.noise.dtype).to(self.work.noise.device)
        inputs["timestep"] = torch.zeros_like(inputs["timestep"]) + timestep.to(inputs["timestep"].dtype)
        with torch.no_grad():
            expected = self.work.model(**inputs, return_dict=False)[0]
        error = relative_l2(executable.session()(**inputs, return_dict=False)[0], expected)
        most = tolerance(FIRST_STEP, expected.dtype)
        if not error <= most:
            raise CompileError(f"the first step is {error:.2e} from the eager model, more than {most:g}")
        return error

    def ceilings(self) -> Iterator[Row]:
        """The FLOP/s of a large product, whose share a run reaches."""
        work, device = self.work, self.work.noise.device
        size = 256 if work.tiny else 8192
        one, other = (torch.randn(size, size, device=device).to(work.noise.dtype) for _ in range(2))
        _timed(lambda: one @ other)
        best = min(_timed(lambda: one @ other)[0] for _ in range(10))
        self.ceiling = 2 * size**3 / best
        yield "ceiling", {"flop_per_s": self.ceiling}

    def fingerprints(self) -> Iterator[Row]:
        """The digest of all weights, for the first time."""
        spent, _ = _timed(lambda: torch.tensor(len(fingerprint(self.work.model))))
        size = sum(value.nbytes for value in self.work.model.parameters())
        yield "fingerprint", {"seconds": spent, "bytes": size}

    def whole(self) -> Iterator[Row]:
        """torch.compile of the whole model with CUDA graphs."""
        model = sharing_weights(self.work.model)
        compiled = torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead", disable=self.work.tiny)
        yield "reduce-overhead", self.seconds(lambda: self._run(compiled))


def _timed(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    begun = time.perf_counter()
    value = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun, value


def measurements(part: str, options: argparse.Namespace) -> dict[str, Callable[[], Iterator[Row]]]:
    """What a part measures, in order of worth."""
    images = 16 if part == "dit16" and not options.tiny else 1
    measuring = Measuring(flux(options) if part == "flux" else dit(images, options), options.build_only)
    others: dict[str, Callable[[], Iterator[Row]]] = {"eager": measuring.eager, "regional": measuring.regional}
    if part == "whole":
        return {"reduce-overhead": measuring.whole}
    if part == "dit16":
        return {"ceiling": measuring.ceilings, "ours full": partial(measuring.ours, "full", loop=False), **others}
    loop, book = part == "dit1", "slow book" if part == "dit1" else "fast book"
    plans = {f"ours {name}": partial(measuring.ours, name, loop) for name in ("full", book)}
    masks = {"cache-dit mask": measuring.step_mask} if part == "dit1" else {}
    return {"fingerprint": measuring.fingerprints, **plans, **others, **masks}


def main(given: list[str] | None = None) -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("dit1", "dit16", "flux", "whole"))
    parser.add_argument("rows", type=Path, help="file that the rows are added to")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plans", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--build-only", action="store_true", help="fill the compilers' caches; no row is written")
    options = parser.parse_args(given)
    rows = None if options.build_only else Rows(options.rows)
    if rows is not None:
        rows.begin(options.part, options.device)
    torch.set_grad_enabled(False)
    for name, measure in measurements(options.part, options).items():
        write_all(rows, options.part, name, measure)


if __name__ == "__main__":
    main()
