"""Slots: where stored values are kept between steps, assigned by liveness."""

from collections.abc import Collection
from dataclasses import dataclass

from stepgraph.plan import CachePlan
from stepgraph.plan.liveness import Stored, traffic


@dataclass(frozen=True)
class StepSlots:
    """Slot numbers of one step, in the order of the variant's reads and stores; `frees` are emptied at its end.

    A slot holds one stored value, which is several tensors where it is the linear maps' of a LOWRANK site.
    """

    reads: tuple[int, ...]
    stores: tuple[int, ...]
    frees: tuple[int, ...]


@dataclass(frozen=True)
class SlotPlan:
    """Which slot holds which value when.

    Attributes:
        steps: Slot numbers of every step.
        count: How many slots there are.
        stored: Number of (step, site) pairs that store a value.
    """

    steps: tuple[StepSlots, ...]
    count: int
    stored: int


def assign_slots(plan: CachePlan, folded: Collection[int] = ()) -> SlotPlan:
    """Give every stored value the lowest slot that is free from its COMPUTE to its last read.

    Args:
        plan: The plan.
        folded: Sites whose values are kept as part of another's.
    """
    slot_of: dict[Stored, int] = {}
    free: list[int] = []
    count = 0
    steps = []
    for step in traffic(plan, folded):
        reads = tuple(slot_of[stored] for stored in step.sources)
        for stored in step.stores:
            if not free:
                free.append(count)
                count += 1
            slot_of[stored] = free.pop(0)
        stores = tuple(slot_of[stored] for stored in step.stores)
        frees = tuple(slot_of.pop(stored) for stored in step.frees)
        free = sorted([*free, *frees])
        steps.append(StepSlots(reads, stores, frees))
    return SlotPlan(tuple(steps), count, sum(len(step.stores) for step in steps))
