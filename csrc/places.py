"""How tensors reach the kernels: an address and two strides each.

Kernels see [B, N, C]. A tensor of two dimensions is one batch [1, N, C]; one of more than three is taken where it is
contiguous. Channels are contiguous, other strides are free, and a modulation is broadcast by strides of 0.
"""

import struct
from functools import lru_cache

import torch
from torch import Tensor

from stepgraph.csrc.library import LEVELS, level
from stepgraph.op_shapes import per_batch

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# Address and strides of a tensor's batches and tokens, in elements: `Rows` in native.h.
Place = tuple[int, int, int]


@lru_cache(maxsize=64)
def _layout(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


def words(*values: int) -> bytes:
    """The arguments of a kernel as the structs of the C++ side read them: one 64-bit word each."""
    return _layout(len(values)).pack(*values)


def batches_tokens(x: Tensor) -> tuple[int, int]:
    """B and N of a tensor [..., C]."""
    if x.ndim == 3:
        return x.shape[0], x.shape[1]
    return 1, x.numel() // x.shape[-1] if x.numel() else 0


def common(x: Tensor) -> tuple[int, ...]:
    """What the arguments of every kernel begin with: `Common` in native.h."""
    return (LEVELS.index(level()), DTYPES[x.dtype], torch.get_num_threads(), *batches_tokens(x), x.shape[-1])


def rows_of(x: Tensor) -> Place:
    """Where the rows of a tensor are."""
    if x.ndim == 3:
        batches, tokens, _ = x.stride()
        return x.data_ptr(), batches, tokens
    return x.data_ptr(), 0, x.stride(0) if x.ndim == 2 else x.shape[-1]


def modulation_of(modulation: Tensor, x: Tensor) -> Place:
    """Where each row of `x` finds its modulation; [B, C] is per batch, as in `ops.rows`."""
    if modulation.ndim == 3:
        (batches, tokens, _), (batch, token, _) = modulation.shape, modulation.stride()
        return modulation.data_ptr(), batch if batches > 1 else 0, token if tokens > 1 else 0
    if per_batch(modulation, x):
        return modulation.data_ptr(), modulation.stride(0) if modulation.shape[0] > 1 else 0, 0
    steps = [0 if size == 1 else step for size, step in zip(modulation.shape[:-1], modulation.stride()[:-1], strict=True)]
    steps = [0] * (2 - len(steps)) + steps
    return modulation.data_ptr(), steps[0], steps[1]


def declines_tensors(x: Tensor) -> str:
    """Why there are no kernels for tensors like x: device or dtype."""
    if x.device.type != "cpu":
        return f"tensors on {x.device.type}; takes those on cpu"
    return "" if x.dtype in DTYPES else f"{x.dtype}; takes {' and '.join(map(str, DTYPES))}"


def declines_modulations(x: Tensor, *modulations: Tensor) -> str:
    """Why modulations cannot be read beside the rows of x: they are broadcast by strides, but channels have none."""
    for modulation in modulations:
        if modulation.shape[-1:] != x.shape[-1:]:
            return f"a modulation {list(modulation.shape)} for x {list(x.shape)}; takes [..., {x.shape[-1]}]"
    return ""
