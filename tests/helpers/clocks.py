"""A clock for tuning where nothing can be timed: candidates run as on a device, all of them on the same tensors."""

import contextlib
from collections.abc import Sequence
from unittest import mock

from stepgraph.triton_kernels import gated_residual, launch, linear_combination, lowrank_delta, projection
from stepgraph.tuning import tuning

TUNED = (gated_residual, linear_combination, lowrank_delta, projection)


def first_and_last(key, candidates: Sequence[launch.Config], *how) -> launch.Launch:
    """`fastest` of two: those between run no other code than these."""
    return launch.fastest(key, [candidates[0], candidates[-1]] if len(candidates) > 2 else candidates, *how)


@contextlib.contextmanager
def fake_clock(runs: int = 1, last: bool = True):
    """Within it kernels are tuned: of their candidates the first and the last run `runs` times each, and the last wins, or the
    first.

    Gives how many times each candidate was run, in order.
    """
    ran: list[int] = []

    def clock(run) -> float:
        for _ in range(runs):
            run()
        ran.append(runs)
        return float(-len(ran) if last else len(ran))

    launch.forget()
    # Deterministic algorithms, which the tests ask for, leave nothing to choose by time.
    with contextlib.ExitStack() as stack:
        for file in TUNED:
            stack.enter_context(mock.patch.object(file, "fastest", first_and_last))
        stack.enter_context(mock.patch.object(launch, "clock", clock))
        stack.enter_context(mock.patch.object(launch, "cannot_time", return_value=False))
        stack.enter_context(tuning())
        try:
            yield ran
        finally:
            launch.forget()
