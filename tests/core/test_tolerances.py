"""The table of tolerances: one number for a purpose and a dtype."""

import pytest
import torch

from stepgraph import tolerances
from stepgraph.tolerances import EXPORTED_RUN, FIRST_STEP, OP, PASS_CHECK, REPLAY, WHOLE_RUN, tolerance

PURPOSES = {name: value for name, value in vars(tolerances).items() if name.isupper() and isinstance(value, dict)}


def test_a_dtype_that_a_row_names_and_one_that_it_does_not():
    assert tolerance(REPLAY, torch.float32) == 1e-5
    assert tolerance(REPLAY, torch.float8_e4m3fn) == 6e-2
    assert tolerance(PASS_CHECK, torch.bfloat16) == 3e-2
    # What the tests go by, too.
    assert tolerance(WHOLE_RUN, torch.float32) == tolerance(EXPORTED_RUN, torch.float32) == 1e-5
    assert (tolerance(OP, torch.float32), tolerance(OP, torch.float16), tolerance(OP, torch.bfloat16)) == (1e-6, 1e-3, 8e-3)
    with pytest.raises(KeyError):
        tolerance(FIRST_STEP, torch.int64)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_coarser_dtypes_may_be_further_apart(purpose):
    table = PURPOSES[purpose]
    order = [torch.float64, torch.float32, torch.float16, torch.bfloat16, None]
    values = [table[dtype] for dtype in order if dtype in table]
    assert values == sorted(values)
    assert set(table) <= set(order)


@pytest.mark.parametrize("depth", [576, 1152, 3072, 12288])
def test_sums_in_float32_are_as_far_off_as_their_depth_allows(depth):
    """Products added up one after the other, against float64: within the bar, and not so far below that it says nothing."""
    x, b = torch.randn(64, depth), torch.randn(depth, 64)
    total = torch.zeros(64, 64)
    for k in range(depth):
        total += x[:, k, None] * b[k]
    exact = x.double() @ b.double()
    error = float((total - exact).norm() / exact.norm())
    bar = tolerance(OP, torch.float32, depth)
    assert 0.25 * bar <= error <= 0.75 * bar


def test_depth_counts_where_it_is_more_than_a_rounding():
    assert tolerance(OP, torch.float32, 512) == tolerance(OP, torch.float32)
    assert tolerance(OP, torch.bfloat16, 12288) == tolerance(OP, torch.bfloat16)
    # Of the deepest products of FLUX, on a device: 1.03e-6.
    assert 1.03e-6 < tolerance(OP, torch.float32, 3072) < 3e-6
