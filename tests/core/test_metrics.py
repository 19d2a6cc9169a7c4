"""What an error is worth at its cost."""

import math

import pytest

from stepgraph.metrics import error_at_equal_macs

POINTS = [(0.25, 0.16), (0.8, 0.01), (0.5, 0.04)]


@pytest.mark.parametrize("macs", [0.25, 0.3, 0.375, 0.5, 0.6, 0.65, 0.8])
def test_between_points_the_logarithm_is_linear(macs):
    low, high = ((0.25, 0.16), (0.5, 0.04)) if macs <= 0.5 else ((0.5, 0.04), (0.8, 0.01))
    slope = (math.log(high[1]) - math.log(low[1])) / (high[0] - low[0])
    expected = math.exp(math.log(low[1]) + slope * (macs - low[0]))
    assert error_at_equal_macs(POINTS, macs) == pytest.approx(expected, rel=1e-12)


def test_beyond_the_points():
    assert error_at_equal_macs(POINTS, 0.2) is None
    assert error_at_equal_macs(POINTS, 1 / (1 / 0.25)) == pytest.approx(0.16)
    assert error_at_equal_macs([(1 / 3, 0.2), (0.5, 0.1)], 1 / 3 * (1 - 1e-12)) == pytest.approx(0.2)
    assert error_at_equal_macs(POINTS, 0.9) == 0.01


def test_towards_a_point_without_error_the_line_is_straight():
    full = [*POINTS, (1, 0.0)]
    assert error_at_equal_macs(full, 0.9) == pytest.approx(0.005)
    assert error_at_equal_macs(full, 1) == 0
