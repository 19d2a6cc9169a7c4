"""Formulas of forecasts: the weights with which a value's past ones are added up.

All are worked out once, when a plan is made, from the schedule's own timesteps; nothing of them is left at run time but the
weights. `times` are those of the stored values, the newest first, all different; `now` is the time that is forecast. The unit
of time does not matter, nor does its direction. Every rule of order 0 is the last value.
"""

from collections.abc import Callable, Sequence

import numpy as np

from stepgraph.checks import check_whole
from stepgraph.errors import ArgumentError

HIGHEST = 4


def taylor(times: Sequence[float], now: float, order: int) -> list[float]:
    """TaylorSeer (arXiv 2503.06923): the sum over j up to `order` of x^j / j! F_j, with x = now - times[0].

    F_0 is the last value, and whenever a value is stored F_{j+1} = (F_j - F_j before) / (its time - the time before): on an
    even grid the j-th backward difference over h^j, which stands for the derivative at `times[0]` without the terms that
    Newton's backward extrapolation adds (x^2 / 2 in place of x (x + h) / 2). It is therefore exact for straight lines only,
    whatever the order.

    On an uneven grid every F_{j+1} is divided by the last gap alone, where a divided difference takes the whole span: with gaps
    a (the newest) and b, F_2 = (F_1 - F_1 before) / a in place of 2 (F_1 - F_1 before) / (a + b). After a short gap higher
    orders are overrated by that, after a long one underrated. Straight lines stay exact.
    """
    count = _checked(times, order)
    # Row m: the weights, on the stored values, of F_j as it was when the m-th newest one was stored.
    factors, weights, x, scale = np.eye(count), np.zeros(count), now - times[0], 1.0
    for j in range(count):
        weights += scale * factors[0]
        gaps = np.array([times[m] - times[m + 1] for m in range(len(factors) - 1)])
        factors = (factors[:-1] - factors[1:]) / gaps[:, None]
        scale *= x / (j + 1)
    return [float(weight) for weight in weights]


def polynomial(times: Sequence[float], now: float, order: int) -> list[float]:
    """The polynomial through the last order + 1 values, at `now`: exact for polynomials up to that order, on any grid."""
    count = _checked(times, order)
    return _matching(times, now, np.ones(count))


def adams_bashforth(times: Sequence[float], now: float, order: int) -> list[float]:
    """The mean, from the last stored value's time to `now`, of the polynomial through the last order + 1 values.

    These are the weights with which an Adams-Bashforth method of order + 1 steps integrates the right-hand side of an ODE from
    times[0] to `now` (3/2, -1/2 on an even grid one gap ahead), so that one large step with the forecast output ends where the
    method would. As an estimate of the value at `now` itself it lags behind the polynomial: to first order it is taken halfway.
    """
    count = _checked(times, order)
    return _matching(times, now, 1 / np.arange(1, count + 1))


def _matching(times: Sequence[float], now: float, moments: np.ndarray) -> list[float]:
    """The weights w that satisfy sum_i w_i u_i^k = moments[k] for every k, where u runs from times[0] (0) to `now` (1)."""
    count, span = len(moments), now - times[0]
    if span == 0:
        return [1.0, *[0.0] * (count - 1)]
    nodes = (np.array(times[:count]) - times[0]) / span
    return [float(weight) for weight in np.linalg.solve(np.vander(nodes, increasing=True).T, moments)]


def _checked(times: Sequence[float], order: int) -> int:
    """The number of values that are needed.

    Raises:
        PlanError: The order is not one of 0 to 4, or there are too few times, or two of them are equal.
    """
    check_whole("the order", order, 0, HIGHEST)
    if len(set(times[: order + 1])) < order + 1:
        raise ArgumentError(f"order {order} takes {order + 1} different times; got {list(times)}")
    return order + 1


RULES: dict[str, Callable[[Sequence[float], float, int], list[float]]] = {
    "taylor": taylor,
    "polynomial": polynomial,
    "adams_bashforth": adams_bashforth,
}
