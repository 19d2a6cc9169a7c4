"""Packed forms of weights, made once and kept as long as the weight lives."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class PackedWeights:
    """Packed forms of weights, by storage, place, layout and version.

    A weight that is written to in place has another version and is packed again; one whose storage is gone takes its packed
    form along. Tensors made under `torch.inference_mode` have no version: they are packed in every call.

    Args:
        pack: Makes the packed form of a weight [columns, length], as nn.Linear keeps it.
        limit: Bytes of packed weights that are kept; beyond, those that were not used for longest are packed again when they
            are. All are kept unless given.
    """

    def __init__(self, pack: Callable[[Tensor], Tensor], limit: int | None = None) -> None:
        self.pack, self.limit = pack, limit
        self.bytes = 0
        self._kept: OrderedDict[tuple[Any, ...], tuple[tuple[int, ...], Tensor, int]] = OrderedDict()
        self._owners: dict[int, weakref.ref[Any]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drop everything: what is used again is packed again."""
        for key in list(self._kept):
            self._drop(key)

    def get(self, *weights: Tensor) -> Tensor:
        """The packed form of a weight, or of several, one below the other."""
        if any(weight.is_inference() for weight in weights):
            return self.pack(_stacked(weights))
        storages = [weight.untyped_storage() for weight in weights]
        key = tuple(_place(weight, storage) for weight, storage in zip(weights, storages, strict=True))
        versions = tuple(weight._version for weight in weights)
        kept = self._kept.get(key)
        if kept is not None and kept[0] == versions:
            self._kept.move_to_end(key)
            return kept[1]
        self._drop(key)
        packed = self.pack(_stacked(weights))
        # A packed form whose layout is its maker's secret tells no size of its own.
        size = sum(weight.nbytes for weight in weights) if packed.is_mkldnn else packed.nbytes
        for storage in storages:
            if id(storage) not in self._owners:
                self._watch(storage)
        self._kept[key] = (versions, packed, size)
        self.bytes += size
        while self.limit is not None and self.bytes > self.limit and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))
        return packed

    def _watch(self, storage: torch.UntypedStorage) -> None:
        """Let a storage's entries go when it dies: its number is given out again."""
        number = id(storage)
        self._owners[number] = weakref.ref(storage, lambda _: self._forget(number))

    def _drop(self, key: tuple[Any, ...]) -> None:
        kept = self._kept.pop(key, None)
        self.bytes -= kept[2] if kept else 0

    def _forget(self, number: int) -> None:
        self._owners.pop(number, None)
        for key in [key for key in self._kept if any(part[0] == number for part in key)]:
            self._drop(key)


def _place(weight: Tensor, storage: torch.UntypedStorage) -> tuple[Any, ...]:
    return id(storage), weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(weights)) if len(weights) > 1 else weights[0]
