"""Where the stored values of a session lie, step by step: in its arena, or between their uses in host memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from stepgraph.plan.liveness import VALUE
from stepgraph.runtime.memory.arena import Place, Span, aligned, assign_offsets
from stepgraph.runtime.memory.slots import SlotPlan

# A stored value is several tensors where it is the linear maps' of a LOWRANK site.
Places = tuple[Place, ...]
# A tensor, and the dtype it is kept in.
Kept = tuple[torch.Tensor, torch.dtype]


@dataclass(frozen=True)
class Moves:
    """What one step of one branch does with places.

    Attributes:
        stores: Where the values go that the step stores, in the order of its slots.
        leave: Slots whose values are copied to host memory while the step runs, with the places there.
        come: Slots whose values are copied back while the step runs, for the next one to read, with their new places.
    """

    stores: tuple[Places, ...] = ()
    leave: tuple[tuple[int, Places], ...] = ()
    come: tuple[tuple[int, Places], ...] = ()


@dataclass(frozen=True)
class Layout:
    """A session's memory: activations that cross regions at the arena's beginning, stored values behind them.

    Attributes:
        nbytes: The arena's size.
        work_bytes: What of it is for activations.
        peak_bytes: The most bytes of stored values that it holds at once.
        host_bytes: Host memory for values that are off-loaded.
        steps: Per step and branch.
    """

    nbytes: int
    work_bytes: int
    peak_bytes: int
    host_bytes: int
    steps: tuple[tuple[Moves, ...], ...]


@dataclass
class _Value:
    """A stored value: its slot, its tensors, and the steps that store and read it."""

    slot: int
    number: int
    kept: Sequence[Kept]
    uses: list[int] = field(default_factory=list)


def lay_out(
    slots: SlotPlan, kept: Sequence[Sequence[Sequence[Kept]]], branches: int, work_bytes: int, offload: bool = False
) -> Layout:
    """Give every stored tensor its places.

    Args:
        slots: Of the plan.
        kept: Per step and stored value its tensors (fake ones) and the dtypes they are kept in.
        branches: Which take turns at every step.
        work_bytes: What activations need.
        offload: Whether values leave the device between uses that are far enough apart. One that was used at step s leaves
            while step s + 1 runs; one that is used at step s comes while step s - 1 runs.
    """
    values = _values(slots, kept)
    device = _Area(branches, work_bytes)
    host = _Area(branches, 0)
    stays = [(value, _stays(value.uses, offload)) for value in values]
    for value, spans in stays:
        for first, last in spans:
            device.add(value, first, last)
        for (_, left), (back, _) in zip(spans, spans[1:], strict=False):
            host.add(value, left, back)
    device.assign()
    host.assign()
    steps = [[_Moving() for _ in range(branches)] for _ in slots.steps]
    for value, spans in stays:
        for branch in range(branches):
            for span, (first, last) in enumerate(spans):
                place = device.places[value.slot, first, branch]
                if span == 0:
                    steps[first][branch].stores[value.number] = place
                else:
                    steps[first][branch].come.append((value.slot, place))
                if span + 1 < len(spans):
                    steps[last][branch].leave.append((value.slot, host.places[value.slot, last, branch]))
    moves = tuple(tuple(moving.done() for moving in row) for row in steps)
    return Layout(work_bytes + device.total, work_bytes, device.peak(), host.total, moves)


def _values(slots: SlotPlan, kept: Sequence[Sequence[Sequence[Kept]]]) -> list[_Value]:
    """All stored values, in the order in which they are stored."""
    values: list[_Value] = []
    held: dict[int, _Value] = {}
    for step, moves in enumerate(slots.steps):
        for slot in moves.reads:
            held[slot].uses.append(step)
        for position, slot in enumerate(moves.stores):
            held[slot] = _Value(slot, position, kept[step][position], [step])
            values.append(held[slot])
    return values


def _stays(uses: Sequence[int], offload: bool) -> list[tuple[int, int]]:
    """First and last steps of a value's stays on the device."""
    spans = [(uses[0], uses[0])]
    for step in uses[1:]:
        first, last = spans[-1]
        # Something is won only where a step remains between leaving and coming back.
        if offload and step - last > 3:
            spans[-1] = first, last + 1
            spans.append((step - 1, step))
        else:
            spans[-1] = first, step
    return spans


class _Area:
    """Memory in which stored values get places."""

    def __init__(self, branches: int, base: int) -> None:
        self.branches, self.base, self.total = branches, base, 0
        self.places: dict[tuple[int, int, int], Places] = {}
        self._spans: list[Span] = []
        self._owners: list[tuple[_Value, int, int, int]] = []

    def add(self, value: _Value, first: int, last: int) -> None:
        """Note that a value stays from one step to another, in every branch."""
        for branch in range(self.branches):
            self._owners.append((value, first, last, branch))
            for part, one in enumerate(value.kept):
                moments = first * self.branches + branch, last * self.branches + branch
                self._spans.append(Span(_place(0, *one)[1], *moments, (branch, value.slot, part)))

    def assign(self) -> None:
        """Give all of them their places."""
        offsets, self.total = assign_offsets(self._spans)
        rest = iter(offsets)
        for value, first, _, branch in self._owners:
            places = tuple(_place(self.base + next(rest), *one)[0] for one in value.kept)
            self.places[value.slot, first, branch] = places

    def peak(self) -> int:
        """The most bytes held at once."""
        changes: dict[int, int] = {}
        for value, first, last, branch in self._owners:
            size = sum(place.nbytes for place in self.places[value.slot, first, branch])
            begin, end = first * self.branches + branch, last * self.branches + branch + 1
            changes[begin] = changes.get(begin, 0) + size
            changes[end] = changes.get(end, 0) - size
        held = peak = 0
        for moment in sorted(changes):
            held += changes[moment]
            peak = max(peak, held)
        return peak


@dataclass
class _Moving:
    """`Moves` in the making."""

    stores: dict[int, Places] = field(default_factory=dict)
    leave: list[tuple[int, Places]] = field(default_factory=list)
    come: list[tuple[int, Places]] = field(default_factory=list)

    def done(self) -> Moves:
        return Moves(tuple(self.stores[n] for n in sorted(self.stores)), tuple(self.leave), tuple(self.come))


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
