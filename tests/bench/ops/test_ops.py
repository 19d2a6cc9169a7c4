"""The benchmark of the fused operations: every operation has cases, and a wrong contender is no row."""

import pytest
import torch

from stepgraph.bench.ops.measure import chosen, contenders, interleaved, refuse_wrong
from stepgraph.bench.ops.shapes import Shape, cases
from stepgraph.ops import OPS

TINY = Shape("tiny", 2, 6, 64, 128)


def tiny_cases(dtype=torch.float32):
    return list(cases(TINY, dtype, "cpu"))


def test_every_operation_has_cases():
    assert {case.op.name for case in tiny_cases()} == set(OPS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_agree_and_are_timed(dtype):
    case = next(case for case in tiny_cases(dtype) if case.op.name == "lowrank_delta")
    found = contenders(case)
    assert set(found) >= {"torch", "torch.compile", "full linear", "reference", chosen(case)}
    times = interleaved(found, "cpu", seconds=0.01)
    assert set(times) == set(found)
    assert all(seconds > 0 for seconds in times.values())


def test_a_wrong_result_is_refused():
    case = next(case for case in tiny_cases() if case.op.name == "modulated_norm")
    right = case.run("reference")
    refuse_wrong("reference", case, [right], [right.double()])
    with pytest.raises(RuntimeError, match="reference is wrong on modulated_norm tiny: relative error"):
        refuse_wrong("reference", case, [right * 1.001], [right.double()])
    # Plain torch may round to bfloat16 what a provider keeps in float32.
    case = next(case for case in tiny_cases(torch.bfloat16) if case.op.name == "lowrank_input")
    p = case.run("reference")
    refuse_wrong("torch", case, [p * 1.001], [p.double()])
    with pytest.raises(RuntimeError, match="cpu is wrong on lowrank_input"):
        refuse_wrong("cpu", case, [p * 1.001], [p.double()])
