"""One piece of memory for a session: stored values and the activations that cross regions, at offsets planned by liveness."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64


@dataclass(frozen=True)
class Span:
    """Bytes that are needed from a first to a last moment, both included; `name` says what takes its predecessor's place."""

    nbytes: int
    first: int
    last: int
    name: Hashable = None


def assign_offsets(spans: Sequence[Span]) -> tuple[tuple[int, ...], int]:
    """Offsets at which no two spans overlap in both bytes and time, and the bytes that takes.

    The largest first, each at the lowest gap; what recurs under one name stays in one place where that costs no memory.
    """
    stable = _assign(spans, stable=True)
    lowest = _assign(spans, stable=False)
    return stable if stable[1] <= lowest[1] else lowest


def _assign(spans: Sequence[Span], stable: bool) -> tuple[tuple[int, ...], int]:
    moments = 1 + max((span.last for span in spans), default=-1)
    taken: list[list[tuple[int, int]]] = [[] for _ in range(moments)]
    offsets, before, total = [0] * len(spans), dict[Hashable, int](), 0
    for i in sorted(range(len(spans)), key=lambda i: (-spans[i].nbytes, spans[i].first, i)):
        span = spans[i]
        size = aligned(span.nbytes)
        busy = sorted({entry for moment in range(span.first, span.last + 1) for entry in taken[moment]})
        offset = before.get(span.name) if stable and span.name is not None else None
        if offset is None or any(start < offset + size and offset < end for start, end in busy):
            offset = _lowest_gap(busy, size)
        for moment in range(span.first, span.last + 1):
            taken[moment].append((offset, offset + size))
        offsets[i] = before[span.name] = offset
        total = max(total, offset + size)
    return tuple(offsets), total


def _lowest_gap(busy: Sequence[tuple[int, int]], size: int) -> int:
    """The lowest offset at which `size` bytes are free; `busy` is sorted."""
    at = 0
    for start, end in busy:
        if at + size <= start:
            break
        at = max(at, end)
    return at


def aligned(nbytes: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in an arena.

    Attributes:
        offset: In bytes.
        shape: Of the tensor; it is contiguous.
        dtype: What it is kept in.
        read_as: What it is read as.
        scale: Offset of its scale per sample, [B, 1, ...] float32, for kept dtypes with few exponents.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    read_as: torch.dtype
    scale: int | None = None

    @property
    def narrow(self) -> bool:
        """Whether the tensor is rounded when it is kept."""
        return self.dtype != self.read_as

    @property
    def scales(self) -> tuple[int, ...]:
        """Shape of its scale."""
        return (self.shape[0], *[1] * (len(self.shape) - 1))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor and its scale."""
        return prod(self.shape) * self.dtype.itemsize + (0 if self.scale is None else 4 * self.shape[0])


@dataclass
class Arena:
    """The memory, and views of it, each made once."""

    memory: Tensor
    _views: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = field(default_factory=dict)
    # By identity of the places, which are kept with them.
    _targets: dict[int, tuple[tuple[Place, ...], list[Tensor]]] = field(default_factory=dict)

    @classmethod
    def of(cls, nbytes: int, device: torch.device, pinned: bool = False) -> "Arena":
        """An arena of this size; it can be written to from anywhere, wherever it was made."""
        with torch.inference_mode(False):
            return cls(torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned))

    def at(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The bytes from an offset on as a tensor."""
        key = (offset, shape, dtype)
        if key not in self._views:
            with torch.inference_mode(False), torch.no_grad():
                self._views[key] = self.memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
        return self._views[key]

    def target(self, place: Place) -> Tensor:
        """What to write a tensor of this place to; not for narrow ones."""
        return self.at(place.offset, place.shape, place.dtype)

    def targets(self, places: tuple[Place, ...]) -> list[Tensor]:
        """What to write the tensors of these places to; of the same tuple, found once."""
        known = self._targets.get(id(places))
        if known is None:
            known = self._targets[id(places)] = (places, [self.target(place) for place in places])
        return known[1]

    def tensors(self, place: Place) -> tuple[Tensor, ...]:
        """All that lies at a place: the tensor as it is kept, and its scale."""
        scale = () if place.scale is None else (self.at(place.scale, place.scales, torch.float32),)
        return (self.target(place), *scale)

    def read(self, place: Place) -> Tensor:
        """The tensor at a place: the arena's own memory, unless it is narrow."""
        data = self.target(place)
        if not place.narrow:
            return data
        if place.scale is None:
            return data.to(place.read_as)
        return (data.float() * self.at(place.scale, place.scales, torch.float32)).to(place.read_as)

    def write(self, place: Place, value: Tensor) -> None:
        """Copy a tensor to its place."""
        if place.scale is not None:
            largest = value.abs().flatten(1).amax(1).float().clamp_min(1e-30)
            scale = (largest / torch.finfo(place.dtype).max).reshape(place.scales)
            self.at(place.scale, place.scales, torch.float32).copy_(scale)
            value = value.float() / scale
        self.target(place).copy_(value)

    def copy(self, place: Place, other: "Arena", source: Place) -> None:
        """Copy what lies at a place of another arena, as it is kept there; without waiting, where the memory is pinned."""
        for target, value in zip(self.tensors(place), other.tensors(source), strict=True):
            target.copy_(value, non_blocking=True)

    def spoil(self, place: Place) -> None:
        """Fill a place that nobody may read any more with NaN."""
        self.at(place.offset, (prod(place.shape) * place.dtype.itemsize,), torch.uint8).fill_(255)

    def owns(self, value: Tensor) -> bool:
        """Whether a tensor lies in the arena."""
        return value.untyped_storage().data_ptr() == self.memory.untyped_storage().data_ptr()
