"""Slots: where stored values are kept between steps, assigned by liveness."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from stepgraph.liveness import BYTES, VALUE, Stored, peak_bytes, traffic
from stepgraph.plan import CachePlan
from stepgraph.runtime.arena import Arena, Place, Span, aligned, assign_offsets


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


# A stored value is several tensors where it is the linear maps' of a LOWRANK site.
Places = tuple[Place, ...]


@dataclass(frozen=True)
class Layout:
    """A session's arena: activations that cross regions at its beginning, stored values behind them.

    Attributes:
        nbytes: Its size.
        work_bytes: What of it is for activations.
        stores: Per step and branch, the places of the values stored there, in the order of the variant's stores.
    """

    nbytes: int
    work_bytes: int
    stores: tuple[tuple[tuple[Places, ...], ...], ...]


def lay_out(
    slots: SlotPlan, kept: Sequence[Sequence[Sequence[tuple[torch.Tensor, torch.dtype]]]], branches: int, work_bytes: int
) -> Layout:
    """Give every stored tensor its place, for as long as its slot holds it.

    Args:
        slots: Of the plan.
        kept: Per step and stored value its tensors (fake ones) and the dtypes they are kept in.
        branches: Which take turns at every step.
        work_bytes: What activations need.
    """
    spans: list[Span] = []
    made: list[tuple[torch.Tensor, torch.dtype]] = []
    moments = len(slots.steps) * branches
    freed = {(slot, step): end for slot, step, end in _lives(slots)}
    for moment in range(moments):
        step, branch = divmod(moment, branches)
        for number, slot in enumerate(slots.steps[step].stores):
            last = freed[slot, step] * branches + branch
            for part, (tensor, dtype) in enumerate(kept[step][number]):
                spans.append(Span(_place(0, tensor, dtype)[1], moment, last, (branch, slot, part)))
                made.append((tensor, dtype))
    offsets, total = assign_offsets(spans)
    found = iter(_place(work_bytes + offset, *one)[0] for offset, one in zip(offsets, made, strict=True))
    stores = tuple(
        tuple(tuple(tuple(next(found) for _ in value) for value in kept[step]) for _ in range(branches))
        for step in range(len(slots.steps))
    )
    return Layout(work_bytes + total, work_bytes, stores)


def _lives(slots: SlotPlan) -> Iterator[tuple[int, int, int]]:
    """(slot, step that stores to it, step that frees it) of every stored value."""
    born: dict[int, int] = {}
    for step, moves in enumerate(slots.steps):
        born |= dict.fromkeys(moves.stores, step)
        yield from ((slot, born.pop(slot), step) for slot in moves.frees)


def _place(offset: int, tensor: torch.Tensor, dtype: torch.dtype) -> tuple[Place, int]:
    """A tensor's place, and the bytes up to the end of its scale, if it has one."""
    shape = tuple(tensor.shape)
    end = aligned(tensor.numel() * dtype.itemsize)
    if dtype.itemsize > 1 or dtype == tensor.dtype:
        return Place(offset, shape, dtype, tensor.dtype), end
    return Place(offset, shape, dtype, tensor.dtype, offset + end), end + 4 * shape[0]


def kept_dtype(tensor: torch.Tensor, part: str, storage: torch.dtype | None) -> torch.dtype:
    """What a stored tensor is kept in.

    What increments are added to must cancel, and the latents are the sampler's: they keep their dtype.
    """
    narrower = storage is not None and part == VALUE and storage.itemsize < tensor.dtype.itemsize
    return storage if narrower and storage is not None else tensor.dtype


class SlotTable:
    """Which stored values one branch of a running session holds, and where."""

    def __init__(self, arena: Arena, count: int, spoil: bool = False) -> None:
        self.arena, self.spoil = arena, spoil
        self._held: list[Places | None] = [None] * count

    def read(self, slot: int) -> tuple[torch.Tensor, ...]:
        """The tensors of the value in a slot; not to be written to, nor kept beyond the step."""
        places = self._held[slot]
        if places is None:
            raise RuntimeError(f"slot {slot} is empty: the plan's liveness and the session have come apart")
        return tuple(self.arena.read(place) for place in places)

    def hold(self, slot: int, places: Places) -> None:
        """Note that a value was written to its places."""
        self._held[slot] = places

    def free(self, slot: int) -> None:
        """Forget a value."""
        for place in self._held[slot] or () if self.spoil else ():
            self.arena.spoil(place)
        self._held[slot] = None

    @property
    def bytes(self) -> int:
        """Bytes of the values held now."""
        return sum(place.nbytes for places in self._held if places is not None for place in places)
