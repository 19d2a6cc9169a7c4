"""Weights in the layout that the kernels read."""

import torch
from torch import Tensor

from stepgraph.csrc.library import kernels
from stepgraph.csrc.places import DTYPES
from stepgraph.packed_weights import PackedWeights

LIMIT = 2**31


def pack(weight: Tensor) -> Tensor:
    """A weight [columns, length] in panels; see pack.cpp."""
    library = kernels()
    dtype, (columns, length) = DTYPES[weight.dtype], weight.shape
    packed = torch.empty(library.stepgraph_packed_bytes(dtype, columns, length), dtype=torch.uint8)
    library.stepgraph_pack(dtype, weight.data_ptr(), columns, length, *weight.stride(), packed.data_ptr())
    return packed


PACKED = PackedWeights(pack, LIMIT)
