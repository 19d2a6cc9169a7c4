"""One pytest-benchmark row per operation, shape and dtype; run by `python -m stepgraph.bench.ops`."""

import functools
from typing import Any

import pytest
import torch

from stepgraph.bench.ops.measure import ceilings, chosen, contenders, declined, interleaved
from stepgraph.bench.ops.shapes import SHAPES, Case, Shape, cases
from stepgraph.env import get_logger


@functools.cache
def machine(dtype: torch.dtype, device: str) -> dict[str, float]:
    """The ceilings, measured once."""
    return ceilings(dtype, device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@torch.no_grad()
def test_ops(benchmark: Any, shape: Shape, dtype: str, request: pytest.FixtureRequest) -> None:
    """Time every case of a shape; the row itself is the last case's chosen provider, the figures are in its extra info."""
    device, seconds = request.config.getoption("--device"), request.config.getoption("--seconds")
    wanted = request.config.getoption("--only-op")
    kind = getattr(torch, dtype)
    figures = []
    run = None
    for case in cases(shape, kind, device):
        if not wanted or case.op.name == wanted:
            figures.append(measured(case, kind, device, seconds))
            run = functools.partial(case.run, chosen(case))
    if run is None:
        pytest.skip(f"no operation {wanted}")
    benchmark.extra_info |= {"shape": shape.name, "dtype": dtype, "cases": figures, "ceilings": machine(kind, device)}
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def measured(case: Case, dtype: torch.dtype, device: str, seconds: float) -> dict[str, object]:
    """A case's figures: microseconds of every contender, and which share of the machine's ceilings the chosen one reaches."""
    times = interleaved(contenders(case), device, seconds)
    provider, best = chosen(case), machine(dtype, device)
    floor = max(case.moved / best["copy"], case.flops / best["product"])
    get_logger("bench").info("%s %s: %s", case.op.name, case.name, provider)
    return {
        "op": case.op.name, "case": case.name, "chosen": provider,
        "microseconds": {name: 1e6 * value for name, value in times.items()},
        "versus_torch": times["torch"] / times[provider],
        "versus_compile": times["torch.compile"] / times[provider],
        "versus_reference": times["reference"] / times[provider],
        "versus_full": times["full linear"] / times[provider] if "full linear" in times else None,
        "share_of_floor": floor / times[provider],
        "declined": declined(case),
    }  # fmt: skip
