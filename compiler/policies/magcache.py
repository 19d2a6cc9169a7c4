"""MagCache: reuse the whole stack's residual while its magnitude is expected to stay the same (arXiv 2506.09045)."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepgraph.checks import check_number, check_numbers, check_whole
from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.errors import ArgumentError
from stepgraph.plan import COMPUTE, REUSE, Site


def magcache(
    sites: Sequence[Site],
    steps: int,
    stats: Any = None,
    *,
    threshold: float = 0.06,
    max_skip: int = 3,
    retention: float = 0.2,
    ratios: Sequence[float] | None = None,
    exclude: Sequence[int] = (),
) -> Mapping[str, str]:
    """Skip a step while the accumulated deviation of the residual's magnitude stays within `threshold`.

    With m_s = ||r_s|| / ||r_(s-1)||: the product R of the ratios since the last computed step predicts the magnitude that a
    reused residual misses, and the sum of |1 - R| over the skipped steps is what `threshold` bounds. It looks adaptive, but it
    depends on the calibrated ratios only.

    Args:
        sites: The model's sites.
        steps: T.
        stats: Calibration; not needed where `ratios` are given.
        threshold (relative magnitude, at least 0): Largest accumulated deviation.
        max_skip (steps, at least 0): Most steps skipped in a row.
        retention (share of the steps, 0..1): The first steps that are always computed: int(retention * T + 0.5) of
            them, and at least one.
        ratios (one per step): T magnitude ratios of `stack_residual`, such as published ones.
        exclude (step numbers from 0): Steps that are always computed.

    Raises:
        PlanError: Another number of ratios, or an argument out of range.
    """
    if ratios is None:
        ratios = stats.ratio[:, [site.kind for site in sites].index("stack_residual")].tolist()
    ratios = check_numbers("ratios", ratios)
    check_number("threshold", threshold)
    check_whole("max_skip", max_skip)
    check_number("retention", retention, 0, 1)
    if isinstance(exclude, str) or not isinstance(exclude, Sequence):
        raise ArgumentError(f"exclude is {exclude!r}; expected a list of steps")
    for i, step in enumerate(exclude):
        check_whole(f"exclude[{i}]", step, 0, steps - 1)
    if len(ratios) != steps:
        raise ArgumentError(
            f"ratios holds {len(ratios)} numbers; expected {steps}, one per step; make the plan for {len(ratios)} steps and "
            f"stretch it with plan.resample({steps}, scheduler), or take the nearest ratios: "
            f"[ratios[round(i * {len(ratios) - 1} / {max(steps - 1, 1)})] for i in range({steps})]"
        )
    letters = []
    product, deviation, skipped = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        skip = False
        if step >= int(retention * steps + 0.5):
            product, skipped = product * float(ratio), skipped + 1
            deviation += abs(1 - product)
            skip = step > 0 and deviation <= threshold and skipped <= max_skip and step not in exclude
            if not skip:
                product, deviation, skipped = 1.0, 0.0, 0
        letters.append(REUSE if skip else COMPUTE)
    return {"stack_residual": "".join(letters)}


MAGCACHE = Policy(magcache, source="MagCache, arXiv 2506.09045", needs_stats=True, unless="ratios")
