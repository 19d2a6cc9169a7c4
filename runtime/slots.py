"""Slots: where stored values are kept between steps, assigned by liveness."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from stepgraph.liveness import BYTES, VALUE, Stored, peak_bytes, traffic
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


def assign_slots(plan: CachePlan, dtype: torch.dtype | None = None) -> SlotPlan:
    """Give every stored value the lowest slot that is free from its COMPUTE to its last read.

    Args:
        plan: The plan.
        dtype: What values are kept in, if narrower than the model's.
    """
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
    return SlotPlan(tuple(steps), count, peak_bytes(_narrowed(plan, dtype)), sum(len(step.stores) for step in steps))


def _narrowed(plan: CachePlan, dtype: torch.dtype | None) -> CachePlan:
    """The plan with its values' sizes in another dtype."""
    own = BYTES[plan.header.dtype]
    if dtype is None or dtype.itemsize >= own:
        return plan
    scale = 4 if dtype.itemsize == 1 else 0
    return replace(plan, sites=tuple(replace(s, bytes=s.bytes * dtype.itemsize // own + scale) for s in plan.sites))


@dataclass(frozen=True)
class Narrow:
    """A value kept in a narrower dtype.

    Attributes:
        data: The value over its scale.
        scale: Of every sample, [B, 1, ...] float32, for dtypes with few exponents; None for 1.
        dtype: What it is read as.
    """

    data: torch.Tensor
    scale: torch.Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, value: torch.Tensor, dtype: torch.dtype) -> "Narrow":
        """Round a value."""
        if dtype.itemsize > 1:
            return cls(value.to(dtype), None, value.dtype)
        largest = value.abs().flatten(1).amax(1).float().clamp_min(1e-30)
        scale = (largest / torch.finfo(dtype).max).reshape(-1, *[1] * (value.ndim - 1))
        return cls((value.float() / scale).to(dtype), scale, value.dtype)

    def read(self) -> torch.Tensor:
        """The value."""
        return self.data.to(self.dtype) if self.scale is None else (self.data.float() * self.scale).to(self.dtype)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it occupies."""
        return (self.data,) if self.scale is None else (self.data, self.scale)


class SlotTable:
    """The stored values of one branch of a running session.

    Values are kept by reference, without a copy, or rounded to `dtype` where that is narrower; `bytes` counts the memory they
    really occupy.
    """

    def __init__(self, count: int, dtype: torch.dtype | None = None) -> None:
        self._values: list[tuple[torch.Tensor | Narrow, ...] | None] = [None] * count
        self.dtype = dtype
        self.peak_bytes = 0

    def read(self, slot: int) -> tuple[torch.Tensor, ...]:
        """The tensors of the value in a slot."""
        value = self._values[slot]
        if value is None:
            raise RuntimeError(f"slot {slot} is empty: the plan's liveness and the session have come apart")
        return tuple(kept.read() if isinstance(kept, Narrow) else kept for kept in value)

    def store(self, slot: int, value: Sequence[torch.Tensor], part: str = VALUE) -> None:
        """Keep a value; a view into something larger is copied, so that the larger thing is not kept with it."""
        self._values[slot] = tuple(self._kept(tensor, part) for tensor in value)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _kept(self, value: torch.Tensor, part: str) -> torch.Tensor | Narrow:
        # What increments are added to must cancel, and the latents are the sampler's: they keep their dtype.
        if self.dtype is not None and part == VALUE and self.dtype.itemsize < value.dtype.itemsize:
            return Narrow.of(value, self.dtype)
        return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()

    def free(self, slot: int) -> None:
        """Forget a value."""
        self._values[slot] = None

    @property
    def bytes(self) -> int:
        """Bytes of the storages held now, each counted once."""
        kept = [one for value in self._values if value is not None for one in value]
        tensors = [tensor for one in kept for tensor in (one.tensors if isinstance(one, Narrow) else (one,))]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())
