"""The table of tolerances: one number for a purpose and a dtype."""

import pytest
import torch

from stepgraph import tolerances
from stepgraph.tolerances import FIRST_STEP, PASS_CHECK, REPLAY, tolerance

PURPOSES = {name: value for name, value in vars(tolerances).items() if name.isupper()}


def test_a_dtype_that_a_row_names_and_one_that_it_does_not():
    assert tolerance(REPLAY, torch.float32) == 1e-5
    assert tolerance(REPLAY, torch.float8_e4m3fn) == 6e-2
    assert tolerance(PASS_CHECK, torch.bfloat16) == 3e-2
    with pytest.raises(KeyError):
        tolerance(FIRST_STEP, torch.int64)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_coarser_dtypes_may_be_further_apart(purpose):
    table = PURPOSES[purpose]
    order = [torch.float64, torch.float32, torch.float16, torch.bfloat16, None]
    values = [table[dtype] for dtype in order if dtype in table]
    assert values == sorted(values)
    assert set(table) <= set(order)
