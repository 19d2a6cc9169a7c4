"""LayerNorm and the adaLN modulation in one pass over x; the moments of its rows for other kernels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.triton_kernels.launch import Config, as_rows, launch, modulation_strides, power_of_2, row_strides


@triton.jit
def modulate(x, mean, rstd, scale, shift):
    """norm(x) * (1 + scale) + shift in float32, in this one order of operations for all kernels."""
    return tl.fma((x - mean) * rstd, 1.0 + scale, shift)


@triton.jit
def load_modulation(ptr, strides, batch, token, channel, mask):
    """A modulation for these batches, tokens and channels (which broadcast against each other) in float32."""
    at = batch * strides[0] + token * strides[1] + channel.to(tl.int64) * strides[2]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def modulated_norm_kernel(
    x_ptr, x_strides, scale_ptr, scale_strides, shift_ptr, shift_strides, out_ptr, total, tokens, channels, eps,
    MOMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M of the `total` rows.

    MOMENTS stores only each row's mean and 1 / deviation ([rows, 2] float32). They are found by the same instructions in both
    forms, so that what is normalised by stored moments is equal to the last bit.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)
    batch, token = (row // tokens)[:, None], (row % tokens)[:, None]
    mask = (row < total)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + batch * x_strides[0] + token * x_strides[1] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / channels
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    if MOMENTS:
        tl.store(out_ptr + row * 2, mean, mask=row < total)
        tl.store(out_ptr + row * 2 + 1, rstd, mask=row < total)
    else:
        scale = load_modulation(scale_ptr, scale_strides, batch, token, channel[None, :], mask)
        shift = load_modulation(shift_ptr, shift_strides, batch, token, channel[None, :], mask)
        found = modulate(x, mean[:, None], rstd[:, None], scale, shift)
        tl.store(out_ptr + row[:, None] * channels + channel[None, :], found.to(out_ptr.dtype.element_ty), mask=mask)


def norm_config(channels: int) -> Config:
    """By the width alone, not tuned: the order in which a row is added up depends on it (see `row_moments`)."""
    width = power_of_2(channels)
    return Config.of(min(max(width // 512, 4), 16), BLOCK_M=max(1, 2048 // width), BLOCK_C=width)


def _run(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, out: Tensor) -> Tensor:
    view = as_rows(x)
    total, tokens, channels = view.shape[0] * view.shape[1], view.shape[1], view.shape[2]
    if total == 0:
        return out
    config = norm_config(channels)
    grid = (triton.cdiv(total, config.block["BLOCK_M"]),)
    modulation: list[Any] = []
    for given in (scale, shift):
        modulation += [None, None] if given is None else [given, modulation_strides(given, x)]
    launch(
        x.device, modulated_norm_kernel, grid, config, x, row_strides(x), *modulation, out, total, tokens, channels, eps,
        MOMENTS=scale is None,
    )  # fmt: skip
    return out


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """See `stepgraph.ops.modulated_norm`."""
    return _run(x, scale, shift, eps, torch.empty_like(x, memory_format=torch.contiguous_format))


def row_moments(x: Tensor, eps: float) -> Tensor:
    """Mean and 1 / deviation of each row [..., C] as [rows, 2] float32, to the bit as `modulated_norm` finds them.

    A kernel that normalises tiles of x within a matrix product takes them from here: summed over its own tiles they would
    differ in the last bits, and an unchanged input would no longer give exactly the stored output.
    """
    view = as_rows(x)
    out = torch.empty(view.shape[0] * view.shape[1], 2, dtype=torch.float32, device=x.device)
    return _run(x, None, None, eps, out)
