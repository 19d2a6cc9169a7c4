"""A clock for tuning where nothing can be timed: every candidate runs as on a device, several times on the same tensors."""

import contextlib
from unittest import mock

from stepgraph.triton_kernels import launch
from stepgraph.tuning import tuning

# As `do_bench` runs them more than once.
RUNS = 3


@contextlib.contextmanager
def fake_clock(runs: int = RUNS, last: bool = True):
    """Within it kernels are tuned: each candidate runs `runs` times, and the last wins, or the first.

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
    with mock.patch.object(launch, "clock", clock), mock.patch.object(launch, "cannot_time", return_value=False), tuning():
        try:
            yield ran
        finally:
            launch.forget()
