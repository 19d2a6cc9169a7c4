"""Slots: where stored values are kept between steps, assigned by liveness."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stepgraph.liveness import Stored, peak_bytes, traffic
from stepgraph.plan import CachePlan


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
        peak_bytes: The most bytes held at once, per sample of the batch, over all branches.
        stored: Number of (step, site) pairs that store a value.
    """

    steps: tuple[StepSlots, ...]
    count: int
    peak_bytes: int
    stored: int


def assign_slots(plan: CachePlan) -> SlotPlan:
    """Give every stored value the lowest slot that is free from its COMPUTE to its last read."""
    slot_of: dict[Stored, int] = {}
    free: list[int] = []
    count = 0
    steps = []
    for step in traffic(plan):
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
    return SlotPlan(tuple(steps), count, peak_bytes(plan), sum(len(step.stores) for step in steps))


class SlotTable:
    """The stored values of one branch of a running session.

    Values are kept by reference, without a copy; `bytes` counts the memory they really occupy.
    """

    def __init__(self, count: int) -> None:
        self._values: list[tuple[torch.Tensor, ...] | None] = [None] * count
        self.peak_bytes = 0

    def read(self, slot: int) -> tuple[torch.Tensor, ...]:
        """The tensors of the value in a slot."""
        value = self._values[slot]
        if value is None:
            raise RuntimeError(f"slot {slot} is empty: the plan's liveness and the session have come apart")
        return value

    def store(self, slot: int, value: Sequence[torch.Tensor]) -> None:
        """Keep a value; a view into something larger is copied, so that the larger thing is not kept with it."""
        self._values[slot] = tuple(t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for t in value)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def free(self, slot: int) -> None:
        """Forget a value."""
        self._values[slot] = None

    @property
    def bytes(self) -> int:
        """Bytes of the storages held now, each counted once."""
        tensors = [tensor for value in self._values if value is not None for tensor in value]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())
