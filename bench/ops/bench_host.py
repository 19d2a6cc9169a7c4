"""pytest-benchmark rows of host time: what a call takes of Python before the device has work.

    python -m pytest bench/ops/bench_host.py -p no:cacheprovider -c /dev/null --rootdir bench/ops

Triton's launch is replaced by nothing, so that no device is needed: `by hand` is `OPS[name](...)`, `operator` what a compiled
step calls, `launcher` what of it is neither torch's dispatcher nor Triton's own. In a flat program's row, regions are nothing.
Allocations of results count.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch

from stepgraph.bench.ops.shapes import Case, Shape, cases
from stepgraph.ops import OPS, forget_choices
from stepgraph.runtime.memory.arena import Arena, Place
from stepgraph.runtime.program.region_calls import RegionCall, RegionCalls
from stepgraph.triton_kernels import declines

SHAPE = Shape("tiny", 2, 8, 64, 128)
# About those of a step of DiT-XL/2.
CALLS, WEIGHTS = 143, 400


@contextmanager
def nothing_is_launched() -> Iterator[None]:
    """Triton's kernels are chosen on a CPU, and do nothing."""
    jit = import_module("triton.runtime.jit").JITFunction
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", {"STEPGRAPH_PROVIDERS": "triton"}))
        stack.enter_context(mock.patch.object(declines, "_device", return_value=""))
        stack.enter_context(mock.patch.object(jit, "run", _nothing))
        forget_choices()
        yield
    forget_choices()


def _nothing(*_: object, **__: object) -> None:
    """A mock would count its calls, which takes longer than what is measured."""


def entries(case: Case) -> dict[str, Callable[[], Any]]:
    """The ways to call a case, by name."""
    file = import_module(f"stepgraph.triton_kernels.{case.op.name}")
    operator = case.op.choose(**case.arguments).run
    return {
        "by hand": partial(case.op, **case.arguments),
        "operator": partial(operator, **case.arguments),
        "launcher": partial(getattr(file, case.op.name), **case.arguments),
    }


def flat_program() -> Callable[[], Any]:
    """A step of `CALLS` calls that do nothing."""
    dtype, device = torch.float32, torch.device("cpu")
    arguments = [torch.zeros(2, 8) for _ in range(64)]
    weights = [torch.zeros(8, 8) for _ in range(WEIGHTS)]
    work = tuple(Place(64 * i, (2, 8), dtype, dtype) for i in range(CALLS))
    first = len(arguments) + WEIGHTS
    calls = [
        RegionCall(
            lambda *_: None, (*range(i % 60, i % 60 + 4), *range(64 + i, 64 + i + 6), first + max(0, i - 1)), (first + i,)
        )
        for i in range(CALLS)
    ]
    results = ((torch.Size((2, 8)), dtype, device),)
    shapes = tuple(tensor.shape for tensor in arguments)
    run = RegionCalls(tuple(calls), shapes, weights, work, 64 * CALLS, results, (first + CALLS,), (), ())
    return partial(run, arguments, (), Arena.of(64 * CALLS, device))


@pytest.mark.parametrize("entry", ["by hand", "operator", "launcher"])
@pytest.mark.parametrize("name", list(OPS))
@torch.no_grad()
def test_operations(benchmark: Any, name: str, entry: str) -> None:
    """The first case of an operation."""
    case = next(case for case in cases(SHAPE, torch.float16, "cpu") if case.op.name == name)
    with nothing_is_launched():
        run = entries(case)[entry]
        benchmark.pedantic(run, rounds=200, iterations=50, warmup_rounds=2)


@torch.no_grad()
def test_flat_program(benchmark: Any) -> None:
    """A step, of which `CALLS` are made."""
    benchmark.extra_info["calls"] = CALLS
    benchmark.pedantic(flat_program(), rounds=200, iterations=10, warmup_rounds=2)
