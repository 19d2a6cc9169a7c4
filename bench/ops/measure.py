"""Timing contenders against each other: interleaved, in one process."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stepgraph.bench.ops.shapes import Case
from stepgraph.ops import REFERENCE, load_providers
from stepgraph.tolerances import TIMED_OP, tolerance
from stepgraph.tuning import tuning


def contenders(case: Case) -> dict[str, Callable[[], Any]]:
    """What is compared: plain torch, torch.compile of it, the full linear maps, and every provider that takes the case.

    Raises:
        RuntimeError: torch.compile gave up and would run plain torch; or a contender is wrong.
    """
    runs: dict[str, Callable[[], Any]] = {"torch": case.torch}
    # Compiled code of earlier cases counts against a limit; beyond it, torch would quietly run eagerly.
    torch.compiler.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    runs["torch.compile"] = torch.compile(case.torch, dynamic=False, fullgraph=True)
    if case.full is not None:
        runs["full linear"] = case.full
    load_providers()
    for name, provider in case.op.providers.items():
        if not provider.declines(**case.arguments):
            runs[name] = lambda name=name: case.run(name)  # type: ignore[misc]
    expected = float64_results(case)
    with tuning():
        for name, run in runs.items():
            if name != "full linear":
                refuse_wrong(name, case, results_of(run()), expected)
    return runs


def chosen(case: Case) -> str:
    """The provider that the registry takes for the case."""
    return case.op.choose(**case.arguments).name


def declined(case: Case) -> dict[str, str]:
    """The providers that do not take the case, with their reasons."""
    reasons = {name: provider.declines(**case.arguments) for name, provider in case.op.providers.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def refuse_wrong(name: str, case: Case, given: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """A figure is worth nothing where the result is wrong."""
    given_dtype = next(v[0].dtype if isinstance(v, list) else v.dtype for v in case.arguments.values())
    for value, wanted in zip(given, expected, strict=True):
        error = float((value.double() - wanted).norm() / wanted.norm())
        # Plain torch rounds to the arguments' dtype what a provider keeps in float32.
        dtype = given_dtype if name.startswith("torch") else value.dtype
        if not error <= tolerance(TIMED_OP, dtype):
            raise RuntimeError(f"{name} is wrong on {case.op.name} {case.name}: relative error {error:.2e}")


def float64_results(case: Case) -> list[torch.Tensor]:
    """What the reference gives for the arguments in double precision."""

    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.double()
        return [wide(v) for v in value] if isinstance(value, list) else value

    return results_of(case.op.providers[REFERENCE].run(**{name: wide(value) for name, value in case.arguments.items()}))


def results_of(result: Any) -> list[torch.Tensor]:
    """One result or several, as a list."""
    return list(result) if isinstance(result, (list, tuple)) else [result]


def interleaved(calls: Mapping[str, Callable[[], Any]], device: str, seconds: float = 1.0) -> dict[str, float]:
    """Median seconds of one call of each contender; they take turns, so that all see the same machine."""
    clock = _cuda_seconds if device.startswith("cuda") else _cpu_seconds
    for run in calls.values():
        run()
    round_seconds = sum(clock(run, 1) for run in calls.values())
    # Short calls are timed in batches, so that the clock does not count.
    repeats = {name: max(1, min(50, int(2e-4 / max(clock(run, 1), 1e-7)))) for name, run in calls.items()}
    rounds = max(5, min(60, int(seconds / max(round_seconds, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, run in calls.items():
            times[name].append(clock(run, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _cpu_seconds(run: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - started) / repeats


def _cuda_seconds(run: Callable[[], Any], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def ceilings(dtype: torch.dtype, device: str, size: int = 0, seconds: float = 1.0) -> dict[str, float]:
    """What the machine can do: bytes per second of a large copy (read and written), FLOP/s of a large matrix product.

    Args:
        dtype: Of the product.
        device: The machine's.
        size: Rows of its matrices; the usual ones unless given. What is copied has 16 size^2 bytes, at most 512 MiB.
        seconds: Of the measurement.
    """
    size = size or (2048 if device == "cpu" else 8192)
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    big = torch.empty(min(16 * size**2, 2**29), dtype=torch.uint8, device=device)
    target = torch.empty_like(big)
    times = interleaved({"copy": lambda: target.copy_(big), "product": lambda: one @ other}, device, seconds)
    return {"copy": 2 * big.nbytes / times["copy"], "product": 2 * size**3 / times["product"]}
