"""Weights in the layout that the kernels read, made once and kept as long as the weight lives."""

import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from stepgraph.csrc.library import kernels
from stepgraph.csrc.places import DTYPES

# Bytes of packed weights that are kept; beyond, those that were not used for longest are packed again when they are.
LIMIT = 2**31


class PackedWeights:
    """Packed forms of weights, by storage, place, layout and version.

    A weight that is written to in place has another version and is packed again; one whose storage is gone takes its packed
    form along. Tensors made under `torch.inference_mode` have no version: they are packed in every call.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[tuple[Any, ...], tuple[int, Tensor]] = OrderedDict()
        self._owners: dict[int, weakref.ref[Any]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, weight: Tensor) -> Tensor:
        """The packed form of a weight [columns, length], as nn.Linear keeps it."""
        if weight.is_inference():
            return pack(weight)
        storage = weight.untyped_storage()
        key = (id(storage), weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        kept = self._kept.get(key)
        if kept is not None and kept[0] == weight._version:
            self._kept.move_to_end(key)
            return kept[1]
        self._drop(key)
        packed = pack(weight)
        if id(storage) not in self._owners:
            self._watch(storage)
        self._kept[key] = (weight._version, packed)
        self.bytes += packed.nbytes
        while self.bytes > self.limit and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))
        return packed

    def _watch(self, storage: torch.UntypedStorage) -> None:
        """Let a storage's entries go when it dies: its number is given out again."""
        number = id(storage)
        self._owners[number] = weakref.ref(storage, lambda _: self._forget(number))

    def _drop(self, key: tuple[Any, ...]) -> None:
        kept = self._kept.pop(key, None)
        self.bytes -= kept[1].nbytes if kept else 0

    def _forget(self, number: int) -> None:
        self._owners.pop(number, None)
        for key in [key for key in self._kept if key[0] == number]:
            self._drop(key)


def pack(weight: Tensor) -> Tensor:
    """A weight [columns, length] in panels; see pack.cpp."""
    library = kernels()
    dtype, (columns, length) = DTYPES[weight.dtype], weight.shape
    packed = torch.empty(library.stepgraph_packed_bytes(dtype, columns, length), dtype=torch.uint8)
    library.stepgraph_pack(dtype, weight.data_ptr(), columns, length, *weight.stride(), packed.data_ptr())
    return packed


PACKED = PackedWeights()
