"""The rows of host time: every operation is called in all three ways, and a flat program makes its calls."""

import pytest
import torch

from stepgraph.bench.ops.bench_host import CALLS, SHAPE, entries, flat_program, nothing_is_launched
from stepgraph.bench.ops.shapes import cases
from stepgraph.ops import OPS
from stepgraph.runtime.program import region_calls
from stepgraph.triton_kernels import declines


@pytest.mark.skipif(not declines._installed(), reason="triton is not installed")
@pytest.mark.parametrize("name", list(OPS))
def test_every_entry_comes_to_a_launch(monkeypatch, name):
    case = next(case for case in cases(SHAPE, torch.float16, "cpu") if case.op.name == name)
    from triton.runtime.jit import JITFunction

    with nothing_is_launched():
        launched = []
        monkeypatch.setattr(JITFunction, "run", lambda *_, **__: launched.append(1))
        counts = []
        for run in entries(case).values():
            launched.clear()
            run()
            counts.append(len(launched))
    assert counts[0] >= 1
    assert len(set(counts)) == 1


def test_a_flat_program_makes_every_call(monkeypatch):
    made = []
    taken = region_calls.itemgetter
    monkeypatch.setattr(region_calls, "itemgetter", lambda *names: lambda held: made.append(len(names)) or taken(*names)(held))
    flat_program()()
    assert made == [12] * CALLS
