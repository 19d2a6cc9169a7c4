"""Packed forms of weights, made once and kept as long as the weight lives."""

import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from stepgraph.contents import Scattered, plain_tensors

# A child that was forked while another thread was at work would wait for that thread's lock for ever.
_every: "weakref.WeakSet[PackedWeights]" = weakref.WeakSet()
_numbers = count(1)


@dataclass(frozen=True, eq=False)
class _Packed:
    """What is kept of some weights.

    Attributes:
        versions: Those of the weights.
        form: Their packed form.
        size: Its bytes.
        number: How many forms had been made, with it.
        values: Some of the values that it was made of; None for weights elsewhere than on the CPU.
    """

    versions: tuple[int, ...]
    form: Tensor
    size: int
    number: int
    values: Scattered | None


class PackedWeights:
    """Packed forms of weights, by storage, place, layout and version.

    A weight that is written to in place has another version and is packed again; one whose storage is gone takes its packed
    form along. Writes that move no version are told by `forget_packed` and `forget_unlike`. Tensors made under
    `torch.inference_mode` have no version: they are packed in every call. Threads share it.

    Args:
        pack: Makes the packed form of a weight [columns, length], as nn.Linear keeps it.
        limit: Bytes of packed weights that are kept; beyond, those that were not used for longest are packed again when they
            are. All are kept unless given.
    """

    def __init__(self, pack: Callable[[Tensor], Tensor], limit: int | None = None) -> None:
        self.pack, self.limit = pack, limit
        self.bytes = self.last = 0
        self._kept: OrderedDict[tuple[Any, ...], _Packed] = OrderedDict()
        self._owners: dict[int, weakref.ref[Any]] = {}
        self._dead: deque[int] = deque()
        self._lock = threading.Lock()
        _every.add(self)

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drop everything: what is used again is packed again."""
        with self._lock:
            for key in list(self._kept):
                self._drop(key)

    def forget(self, weights: Sequence[Tensor]) -> None:
        """Drop what was packed of some weights, or of parts of them."""
        storages = {id(weight.untyped_storage()) for weight in weights}
        with self._lock:
            for key in [key for key in self._kept if any(part[0] in storages for part in key)]:
                self._drop(key)

    def forget_unlike(self, storages: Collection[int], since: int, everything: bool) -> bool:
        """See `forget_unlike`."""
        if self.last <= since:
            return False
        with self._lock:
            stale = [
                key
                for key, entry in self._kept.items()
                if entry.number > since
                and any(part[0] in storages for part in key)
                and (everything or self._is_unlike(key, entry))
            ]
            for key in stale:
                self._drop(key)
        return bool(stale)

    def _is_unlike(self, key: tuple[Any, ...], entry: _Packed) -> bool:
        """Whether weights hold other values than what was packed, as far as some of them tell."""
        storages = [self._owners[part[0]]() if part[0] in self._owners else None for part in key]
        if entry.values is None or any(storage is None for storage in storages):
            return True
        return bool(entry.values.look([_at(part, storage) for part, storage in zip(key, storages, strict=True)]))

    def get(self, *weights: Tensor) -> Tensor:
        """The packed form of a weight, or of several, one below the other."""
        if any(weight.is_inference() for weight in weights):
            return self.pack(_stacked(weights))
        storages = [weight.untyped_storage() for weight in weights]
        key = tuple(_place(weight, storage) for weight, storage in zip(weights, storages, strict=True))
        versions = tuple(weight._version for weight in weights)
        # What several threads ask for at once is packed by one of them; the others wait for it.
        with self._lock:
            self._forget_dead()
            packed = self._obtain(key, versions, weights, storages)
        self._tidy()
        return packed

    def _obtain(
        self,
        key: tuple[Any, ...],
        versions: tuple[int, ...],
        weights: Sequence[Tensor],
        storages: Sequence[torch.UntypedStorage],
    ) -> Tensor:
        entry = self._kept.get(key)
        if entry is not None and entry.versions == versions:
            self._kept.move_to_end(key)
            return entry.form
        self._drop(key)
        values = Scattered(weights) if all(weight.device.type == "cpu" for weight in weights) else None
        packed = self.pack(_stacked(weights))
        # A packed form whose layout is its maker's secret tells no size of its own.
        size = sum(weight.nbytes for weight in weights) if packed.is_mkldnn else packed.nbytes
        for storage in storages:
            if id(storage) not in self._owners:
                self._watch(storage)
        self.last = next(_numbers)
        self._kept[key] = _Packed(versions, packed, size, self.last, values)
        self.bytes += size
        while self.limit is not None and self.bytes > self.limit and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))
        return packed

    def _watch(self, storage: torch.UntypedStorage) -> None:
        """Let a storage's entries go when it dies: its number is given out again."""
        identity = id(storage)

        def died(_: Any) -> None:
            # Called at any moment, also amid the methods here, whose lock this thread or another may hold.
            self._dead.append(identity)
            self._tidy()

        self._owners[identity] = weakref.ref(storage, died)

    def _tidy(self) -> None:
        """Drop what belongs to dead storages, unless somebody is at work here, who does it afterwards."""
        while self._dead and self._lock.acquire(blocking=False):
            try:
                self._forget_dead()
            finally:
                self._lock.release()

    def _forget_dead(self) -> None:
        while self._dead:
            identity = self._dead.popleft()
            self._owners.pop(identity, None)
            for key in [key for key in self._kept if any(part[0] == identity for part in key)]:
                self._drop(key)

    def _drop(self, key: tuple[Any, ...]) -> None:
        entry = self._kept.pop(key, None)
        self.bytes -= entry.size if entry else 0


def forget_packed(weights: Sequence[Tensor]) -> None:
    """Drop what was packed anywhere of some weights, whose values have changed in a way that their versions do not tell."""
    plain = [part for weight in weights for part in plain_tensors(weight) if has_storage(part)]
    for packed in list(_every):
        packed.forget(plain)


def packings() -> int:
    """The number of the last form that was packed, for `forget_unlike`."""
    return max((packed.last for packed in list(_every)), default=0)


def forget_unlike(weights: Sequence[Tensor], since: int, everything: bool = False) -> bool:
    """Drop what was packed anywhere of some weights, after others had been, where they hold other values now.

    Values that were written past versions, packed, and put back the same way look as if nothing had been.

    Args:
        weights: Of which.
        since: What `packings` said then; what was packed before is not looked at.
        everything: Drop all of it: some of the values do not tell enough.

    Returns:
        Whether anything was dropped.
    """
    recent = [packed for packed in list(_every) if packed.last > since]
    if not recent:
        return False
    plain = [part for weight in weights for part in plain_tensors(weight) if has_storage(part)]
    storages = {id(part.untyped_storage()) for part in plain}
    # All of them forget, also where one says that it has.
    forgotten = [packed.forget_unlike(storages, since, everything) for packed in recent]
    return any(forgotten)


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory that it can be told by."""
    return tensor.device.type != "meta" and tensor.layout == torch.strided


def _place(weight: Tensor, storage: torch.UntypedStorage) -> tuple[Any, ...]:
    return id(storage), weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _at(place: tuple[Any, ...], storage: Any) -> Tensor:
    """The tensor at a place that `_place` describes."""
    _, address, dtype, shape, strides = place
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=dtype)
        return empty.set_(storage, (address - storage.data_ptr()) // empty.element_size(), shape, strides)


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(weights)) if len(weights) > 1 else weights[0]


def _unlock_in_child() -> None:
    for packed in _every:
        packed._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)
