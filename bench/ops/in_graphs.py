"""Kernels inside CUDA graphs for `bench/gpu_suite.sh prove`: many calls in one graph, so that no launch counts.

    python -m stepgraph.bench.ops.in_graphs out/rows.jsonl --device cuda

Each operation's chosen provider against plain torch (two products for the low-rank ones) and torch.compile of the reference.
Calls go round several sets of arguments that together exceed the caches. Every result is compared with float64 before it is
timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepgraph.bench.ops.measure import ceilings, chosen, float64_results, refuse_wrong, results_of
from stepgraph.bench.ops.shapes import Case, Shape, cases
from stepgraph.bench.rows import Rows, write_all
from stepgraph.ops import OPS, load_providers

PART = "kernels"
MEASURED = ("lowrank_delta", "modulated_norm", "gated_residual", "linear_combination")
# Named after their tokens: DiT-XL/2 at one image, FLUX at 1024 x 1024 pixels with its text, and four times as many.
SHAPES = (Shape("4608", 1, 4608, 3072, 12288), Shape("512", 2, 256, 1152, 4608), Shape("16384", 4, 4096, 3072, 12288))
TINY = (Shape("16", 2, 8, 64, 128),)
# Arguments that together exceed the second-level cache of any card, at most so many sets.
CACHE_BYTES, MOST_SETS = 256e6, 8
CALLS, REPLAYS = 48, 7


def many_calls(calls: Sequence[Callable[[], Any]], device: str) -> float:
    """Seconds of one call, of `CALLS` in turn within one CUDA graph; on a CPU of a plain loop."""
    if not device.startswith("cuda"):
        begun = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begun) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Tuning and compiling are over before anything is captured.
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            calls[index % len(calls)]()
    graph.replay()
    return statistics.median(_replay_seconds(graph) for _ in range(REPLAYS)) / CALLS


def _replay_seconds(graph: Any) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def sets_of(shape: Shape, dtype: torch.dtype, device: str, op: str) -> Iterator[list[Case]]:
    """The cases of an operation, each with as many sets of arguments as exceed the caches."""
    largest = max(case.moved for case in cases(shape, dtype, device, [op], ["square"]))
    count = min(MOST_SETS, max(1, round(CACHE_BYTES / largest))) if device.startswith("cuda") else 2
    for same in zip(*(cases(shape, dtype, device, [op], ["square"]) for _ in range(count))):
        yield list(same)


def measured(sets: list[Case], machine: dict[str, float], device: str, compiler: bool) -> dict[str, Any]:
    """The figures of one case.

    Raises:
        RuntimeError: A contender is wrong, or torch.compile gave up.
    """
    case, provider = sets[0], chosen(sets[0])
    runs: dict[str, list[Callable[[], Any]]] = {
        "torch": [each.torch for each in sets],
        "chosen": [partial(each.run, provider) for each in sets],
    }
    if compiler:
        # Compiled code of earlier cases counts against a limit; beyond it, torch would quietly run eagerly.
        torch.compiler.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        compiled = torch.compile(case.op.reference, dynamic=False, fullgraph=True)
        runs["torch.compile"] = [partial(compiled, **each.arguments) for each in sets]
    expected = float64_results(case)
    for name, calls in runs.items():
        refuse_wrong(name, case, results_of(calls[0]()), expected)
    seconds = {name: many_calls(calls, device) for name, calls in runs.items()}
    ours = seconds["chosen"]
    return {
        "provider": provider, "microseconds": {name: 1e6 * value for name, value in seconds.items()}, "sets": len(sets),
        "versus_torch": seconds["torch"] / ours,
        "versus_compile": seconds["torch.compile"] / ours if compiler else None,
        "share_of_copy": case.moved / ours / machine["copy"],
        "share_of_floor": max(case.moved / machine["copy"], case.flops / machine["product"]) / ours,
    }  # fmt: skip


def host(op: str, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Microseconds of the host for one call of the operation by hand, its launch included."""
    case = next(cases(shape, dtype, device, [op], ["square"]))
    call = partial(OPS[op], **case.arguments)
    for _ in range(3):
        call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(CALLS):
        call()
    return {"host_us": 1e6 * (time.perf_counter() - begun) / CALLS}


def main(given: list[str] | None = None) -> None:
    """Measure and write the rows "operation, tokens, case"."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="file that the rows are added to")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(given)
    device, rows = options.device, Rows(options.rows)
    rows.begin(PART, device)
    torch.set_grad_enabled(False)
    load_providers()
    dtype, shapes = (torch.float32, TINY) if options.tiny else (torch.bfloat16, SHAPES)
    machine: dict[str, float] = {}
    stand_in = {} if device.startswith("cuda") else {"stand_in": "a loop: there are no graphs on a CPU"}

    def ceiling() -> Iterator[tuple[str, dict[str, Any]]]:
        machine.update(ceilings(dtype, device, *((256, 0.01) if options.tiny else ())))
        yield "ceilings", dict(machine)

    def figures(name: str, sets: list[Case]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield name, {**stand_in, **measured(sets, machine, device, not options.tiny)}

    def hosts() -> Iterator[tuple[str, dict[str, Any]]]:
        smallest = min(shapes, key=lambda shape: shape.channels)
        for op in MEASURED:
            yield f"{op}: by hand", {**stand_in, **host(op, smallest, dtype, device)}

    write_all(rows, PART, "ceilings", ceiling)
    for shape in shapes:
        for op in MEASURED:
            for sets in sets_of(shape, dtype, device, op):
                name = f"{op}, {shape.batch * shape.tokens}, {sets[0].name}"
                write_all(rows, PART, name, partial(figures, name, sets))
    write_all(rows, PART, "by hand", hosts)


if __name__ == "__main__":
    main()
