"""What all kernels share: how they read and write tiles, and which tiles those are compiled with that only stream.

Loads and addresses take the strides of tensors [B, N, C] whose channels are contiguous; `row` counts the rows of all batches.
"""

import triton
import triton.language as tl

from stepgraph.triton_kernels.launch import Config, power_of_2


@triton.jit
def tile(tokens, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's batch, tokens [BLOCK_N, 1], channels [1, BLOCK_C] and mask; channel blocks are side by side."""
    blocks_c, blocks_n = tl.cdiv(channels, BLOCK_C), tl.cdiv(tokens, BLOCK_N)
    channel = ((tl.program_id(0) % blocks_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    block = tl.program_id(0) // blocks_c
    token = ((block % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    return (block // blocks_n).to(tl.int64), token, channel, (token < tokens) & (channel < channels)


@triton.jit
def load_tile(ptr, strides, batch, token, channel, mask):
    """A tile of a tensor, in its dtype, at batches, tokens and channels that broadcast against each other."""
    return tl.load(ptr + batch * strides[0] + token * strides[1] + channel, mask=mask, other=0.0)


@triton.jit
def load_modulation(ptr, strides, batch, token, channel, mask):
    """A modulation for these batches, tokens and channels (which broadcast against each other) in float32."""
    at = batch * strides[0] + token * strides[1] + channel.to(tl.int64) * strides[2]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, row, columns, column, values, mask):
    """Write `values` [rows, columns], in the dtype of what they are written to, which is contiguous and `columns` wide."""
    tl.store(ptr + row * columns + column, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_rows_and_moments(x_ptr, x_strides, total, tokens, channels, eps, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """BLOCK_M of the `total` rows: their numbers [BLOCK_M] int64, channels [BLOCK_C], mask, values, mean and 1 / deviation.

    Whoever normalises takes the moments from here: found by other instructions they would differ in the last bits.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)
    batch, token = (row // tokens)[:, None], (row % tokens)[:, None]
    mask = (row < total)[:, None] & (channel < channels)[None, :]
    x = load_tile(x_ptr, x_strides, batch, token, channel[None, :], mask).to(tl.float32)
    mean = tl.sum(x, axis=1) / channels
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    return row, channel, mask, x, mean, rstd


@triton.jit
def modulate(x, mean, rstd, scale, shift):
    """norm(x) * (1 + scale) + shift in float32, in this one order of operations for all kernels."""
    return tl.fma((x - mean) * rstd, 1.0 + scale, shift)


# Of kernels that find moments: a division and a difference are not contracted into one operation without the rounding between.
AS_WRITTEN = {"enable_fp_fusion": False}


def channel_block(channels: int) -> int:
    """The widest power of two up to 1024 that wastes at most an eighth of its lanes; 128 where none does."""
    return next((block for block in (1024, 512, 256) if -(-channels // block) * block * 8 <= channels * 9), 128)


def stream_configs(channels: int) -> list[Config]:
    """Tiles of 2048, 4096 and 1024 elements."""
    block = channel_block(channels)
    return [Config.of(warps, BLOCK_N=max(1, size // block), BLOCK_C=block) for size, warps in ((2048, 4), (4096, 8), (1024, 4))]


def flat_configs() -> list[Config]:
    """Tiles of one endless row."""
    return [Config.of(warps, BLOCK_N=1, BLOCK_C=size) for size, warps in ((2048, 4), (4096, 8), (1024, 4))]


def norm_config(channels: int) -> Config:
    """Whole rows, by the width alone and not tuned: the order in which a row is added up depends on it."""
    width = power_of_2(channels)
    return Config.of(min(max(width // 512, 4), 16), BLOCK_M=max(1, 2048 // width), BLOCK_C=width)
