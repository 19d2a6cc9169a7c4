"""When a plan's stored values live: from the COMPUTE that stores them to the last step that reads them."""

from dataclasses import dataclass

from stepgraph.plan import COMPUTE, READS_STORED, CachePlan


@dataclass(frozen=True)
class StepTraffic:
    """What one step does with stored values; numbers are site indices of the plan.

    Attributes:
        reads: Sites whose stored value the step reads.
        stores: Sites whose value the step computes and a later step reads.
        frees: Sites whose stored value no later step reads: dropped at the end of the step.
    """

    reads: tuple[int, ...]
    stores: tuple[int, ...]
    frees: tuple[int, ...]


def traffic(plan: CachePlan) -> tuple[StepTraffic, ...]:
    """The stored-value traffic of every step, found by walking the plan backwards once."""
    wanted: set[int] = set()
    steps = []
    for row in reversed(plan.rows):
        reads = {i for i, action in enumerate(row) if action in READS_STORED}
        stores = {i for i, action in enumerate(row) if action == COMPUTE and i in wanted}
        frees = reads - wanted
        # A value that is overwritten at this step was last needed before it.
        wanted = (wanted - stores) | reads
        steps.append(StepTraffic(tuple(sorted(reads)), tuple(sorted(stores)), tuple(sorted(frees))))
    return tuple(reversed(steps))


def peak_bytes(plan: CachePlan) -> int:
    """The most bytes of stored values held at once, per sample, over all branches.

    A step's stored values are complete before those it read for the last time are dropped; branches take turns.
    """
    held: set[int] = set()
    rest = peak = 0
    branches = len(plan.header.branches)
    for step in traffic(plan):
        held |= set(step.stores)
        full = sum(plan.sites[i].bytes for i in held)
        held -= set(step.frees)
        after = sum(plan.sites[i].bytes for i in held)
        # While branch b runs, the ones before it have finished the step and the ones behind it have not begun.
        peak = max(peak, *(b * after + full + (branches - 1 - b) * rest for b in range(branches)))
        rest = after
    return peak
