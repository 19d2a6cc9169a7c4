"""TeaCache by the timestep embedding alone, which makes it a static plan (arXiv 2411.19108, as its Wan and CogVideoX code)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepgraph.checks import check_number, check_numbers, check_whole
from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.errors import ArgumentError, PlanError
from stepgraph.plan import COMPUTE, REUSE, Site


def teacache(
    sites: Sequence[Site],
    steps: int,
    stats: Any,
    *,
    threshold: float = 0.1,
    coefficients: Sequence[float] | None = None,
    degree: int = 4,
    first: int = 1,
    last: int = 1,
) -> Mapping[str, str]:
    """Skip steps while the accumulated, rescaled change of the timestep embedding stays below `threshold`.

    With x_s = ||e_s - e_(s-1)||_1 / ||e_(s-1)||_1 of the timestep embedding e, a polynomial p predicts from x_s how far the
    model's output moves. The predictions of the steps since the last computed one are summed; a step is computed when the sum
    reaches the threshold, and the sum starts again at 0. A skipped step reuses the residual of the whole stack.

    Args:
        sites: The model's sites.
        steps: T.
        stats: Calibration, which has the embedding's changes.
        threshold (relative change, above 0): Accumulated relative change of the output at which a step is computed.
        coefficients: Of the polynomial, highest power first, as the method publishes them; fitted to the calibrated output
            changes by least squares unless given.
        degree (0..8): Of the fitted polynomial.
        first (steps, at least 1): Number of first steps that are always computed.
        last (steps, at least 0): Number of last steps that are always computed.

    Raises:
        PlanError: An argument out of range, a model without a timestep embedding, or fewer steps than the fit needs.
    """
    check_number("threshold", threshold)
    for name, value, least, most in (("first", first, 1, steps), ("last", last, 0, steps), ("degree", degree, 0, 8)):
        check_whole(name, value, least, most)
    change = stats.embedding
    if bool(change.isnan().any()):
        raise PlanError("this model's family names no timestep embedding, which TeaCache's static form goes by")
    powers = _fitted(stats, sites, degree) if coefficients is None else check_numbers("coefficients", coefficients)
    letters, total = [], 0.0
    for step in range(steps):
        total += sum(c * float(change[step]) ** (len(powers) - 1 - i) for i, c in enumerate(powers))
        if step < first or step >= steps - last or not total < threshold:
            letters.append(COMPUTE)
            total = 0.0
        else:
            letters.append(REUSE)
    return {"stack_residual": "".join(letters)}


def _fitted(stats: Any, sites: Sequence[Site], degree: int) -> list[float]:
    """Least squares of the output's relative change over the embedding's, highest power first."""
    output = next(i for i, site in enumerate(sites) if site.kind == "output")
    change = stats.embedding[1:]
    if len(change) <= degree:
        raise ArgumentError(
            f"a polynomial of degree {degree} needs at least {degree + 2} steps to be fitted; this schedule has "
            f"{len(change) + 1}: choose a smaller degree, or give coefficients"
        )
    moved = stats.change[0, 1:, output] / stats.magnitude[:-1, output]
    # Powers of numbers far below 1 are all but equal: the fit is made in a unit in which the largest is 1.
    unit = float(change.max()) or 1.0
    basis = torch.stack([(change / unit) ** power for power in range(degree, -1, -1)], dim=1)
    solution = torch.linalg.lstsq(basis, moved[:, None], driver="gelsd").solution[:, 0]
    return [float(c) / unit ** (degree - i) for i, c in enumerate(solution)]


TEACACHE = Policy(teacache, source="TeaCache, arXiv 2411.19108 (timestep-embedding form)", needs_stats=True)
