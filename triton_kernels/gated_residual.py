"""x + sum_i gate_i * value_i in one pass over all of them, and the tiles of kernels that do nothing but stream."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.triton_kernels.launch import Config, as_rows, fastest, launch, modulation_strides, row_strides
from stepgraph.triton_kernels.modulated_norm import load_modulation
from stepgraph.triton_kernels.settings import MAX_VALUES


@triton.jit
def tile(tokens, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's batch, tokens [BLOCK_N, 1], channels [1, BLOCK_C] and mask; channel blocks are side by side."""
    blocks_c, blocks_n = tl.cdiv(channels, BLOCK_C), tl.cdiv(tokens, BLOCK_N)
    channel = ((tl.program_id(0) % blocks_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    block = tl.program_id(0) // blocks_c
    token = ((block % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    return (block // blocks_n).to(tl.int64), token, channel, (token < tokens) & (channel < channels)


@triton.jit
def gated_residual_kernel(
    x_ptr, x_strides, gate_ptrs, gate_strides, value_ptrs, value_strides, out_ptr, tokens, channels, COUNT: tl.constexpr,
    PER_TOKEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per tile of one batch. Unless PER_TOKEN, a tile's tokens share their gates."""
    batch, token, channel, mask = tile(tokens, channels, BLOCK_N, BLOCK_C)
    at = batch * x_strides[0] + token * x_strides[1] + channel
    total = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(COUNT):
        at = batch * value_strides[i][0] + token * value_strides[i][1] + channel
        value = tl.load(value_ptrs[i] + at, mask=mask, other=0.0).to(tl.float32)
        if PER_TOKEN:
            gate = load_modulation(gate_ptrs[i], gate_strides[i], batch, token, channel, mask)
        else:
            gate = load_modulation(gate_ptrs[i], gate_strides[i], batch, 0, channel, channel < channels)
        total = tl.fma(gate, value, total)
    out_at = (batch * tokens + token) * channels + channel
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=mask)


def channel_block(channels: int) -> int:
    """The widest power of two up to 1024 that wastes at most an eighth of its lanes; 128 where none does."""
    return next((block for block in (1024, 512, 256) if -(-channels // block) * block * 8 <= channels * 9), 128)


def stream_configs(channels: int) -> list[Config]:
    """Tiles of 2048, 4096 and 1024 elements."""
    block = channel_block(channels)
    return [Config.of(warps, BLOCK_N=max(1, size // block), BLOCK_C=block) for size, warps in ((2048, 4), (4096, 8), (1024, 4))]


def _run(x: Tensor, gates: Sequence[Tensor], values: Sequence[Tensor], out: Tensor) -> Tensor:
    """At most MAX_VALUES values."""
    batch, tokens, channels = as_rows(x).shape
    gate_strides = tuple(modulation_strides(gate, x) for gate in gates)
    per_token = any(token for _, token, _ in gate_strides)

    def run(config: Config) -> None:
        blocks = triton.cdiv(tokens, config.block["BLOCK_N"]) * triton.cdiv(channels, config.block["BLOCK_C"])
        launch(
            x.device, gated_residual_kernel, (batch * blocks,), config, x, row_strides(x), tuple(gates), gate_strides,
            tuple(values), tuple(row_strides(value) for value in values), out, tokens, channels, COUNT=len(values),
            PER_TOKEN=per_token,
        )  # fmt: skip

    key = ("gated_residual", batch, tokens, channels, len(values), per_token, x.dtype, x.device)
    run(fastest(key, stream_configs(channels), run))
    return out


def gated_residual(x: Tensor, gates: list[Tensor], values: list[Tensor], out: Tensor | None = None) -> Tensor:
    """See `stepgraph.ops.gated_residual`; a run of more than MAX_VALUES values takes several passes.

    The result is written to `out`, if given; later passes read there what earlier ones wrote, each element by who writes it.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    for start in range(0, len(values) if x.numel() else 0, MAX_VALUES):
        x = _run(x, gates[start : start + MAX_VALUES], values[start : start + MAX_VALUES], out)
    return out
