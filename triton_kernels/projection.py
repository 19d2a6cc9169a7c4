"""B x, the input of linear maps in rank space: what `lowrank_input` stores, and what `lowrank_delta` subtracts it from.

Both must find the same bits for the same x, so both find it here; and the moments of x's rows, where it is normalised first.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.triton_kernels.launch import (
    Config,
    Launch,
    Launches,
    as_rows,
    empty_rows,
    fastest,
    input_precision,
    layout_of,
    machine,
    modulation_strides,
    row_strides,
)
from stepgraph.triton_kernels.lowrank_tiles import project_configs, row_block
from stepgraph.triton_kernels.tiles import AS_WRITTEN, load_modulation, load_rows_and_moments, modulate, norm_config

MOMENTS = Launches[Launch]()


@triton.jit
def moments_kernel(x_ptr, out_ptr, x_strides, total, tokens, channels, eps, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program per BLOCK_M of the `total` rows; out is [rows, 2] float32."""
    row, _, _, _, mean, rstd = load_rows_and_moments(x_ptr, x_strides, total, tokens, channels, eps, BLOCK_M, BLOCK_C)
    tl.store(out_ptr + row * 2, mean, mask=row < total)
    tl.store(out_ptr + row * 2 + 1, rstd, mask=row < total)


@triton.jit
def project(
    x_ptr, x_strides, moments_ptr, scale_ptr, scale_strides, shift_ptr, shift_strides, b_ptr, first, row, total, tokens,
    channels, rank_at, ranks, BLOCK_K: tl.constexpr, ONE_BATCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """B x of the rows `row` [BLOCK_M] int64 (from `first` on) and the ranks `rank_at` [BLOCK_R]: [BLOCK_M, BLOCK_R] float32.

    With moments, x is normalised, modulated, and rounded to its dtype first. ONE_BATCH: the rows are of one batch and the
    modulation is the same for all its tokens, so that it is loaded once a tile.
    """
    batch, token = row // tokens, row % tokens
    x_at = x_ptr + (batch * x_strides[0] + token * x_strides[1])[:, None]
    b_at = b_ptr + rank_at.to(tl.int64)[None, :] * channels
    if moments_ptr is not None:
        mean = tl.load(moments_ptr + row * 2, mask=row < total, other=0.0)[:, None]
        rstd = tl.load(moments_ptr + row * 2 + 1, mask=row < total, other=0.0)[:, None]
    product = tl.zeros((row.shape[0], rank_at.shape[0]), dtype=tl.float32)
    for start in range(0, channels, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        mask = (row < total)[:, None] & (channel < channels)[None, :]
        x = tl.load(x_at + channel[None, :], mask=mask, other=0.0)
        b = tl.load(b_at + channel[:, None], mask=(rank_at < ranks)[None, :] & (channel < channels)[:, None], other=0.0)
        if moments_ptr is not None:
            if ONE_BATCH:
                of, ok = first // tokens, (channel < channels)[None, :]
                scale = load_modulation(scale_ptr, scale_strides, of, 0, channel[None, :], ok)
                shift = load_modulation(shift_ptr, shift_strides, of, 0, channel[None, :], ok)
            else:
                scale = load_modulation(scale_ptr, scale_strides, batch[:, None], token[:, None], channel[None, :], mask)
                shift = load_modulation(shift_ptr, shift_strides, batch[:, None], token[:, None], channel[None, :], mask)
            x = modulate(x.to(tl.float32), mean, rstd, scale, shift).to(x_ptr.dtype.element_ty)
        product = tl.dot(x, b, product, input_precision=PRECISION)
    return product


@triton.jit
def project_kernel(
    x_ptr, moments_ptr, scale_ptr, shift_ptr, b_ptr, p_ptr, out_ptr, x_strides, scale_strides, shift_strides, total, tokens,
    channels, ranks, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ONE_BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M rows and BLOCK_R ranks, those of the same rows side by side: x stays in the cache."""
    blocks = tl.cdiv(ranks, BLOCK_R)
    first = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    rank_at = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    product = project(
        x_ptr, x_strides, moments_ptr, scale_ptr, scale_strides, shift_ptr, shift_strides, b_ptr, first, row, total, tokens,
        channels, rank_at, ranks, BLOCK_K, ONE_BATCH, PRECISION,
    )  # fmt: skip
    at = row[:, None] * ranks + rank_at[None, :]
    mask = (row < total)[:, None] & (rank_at < ranks)[None, :]
    if p_ptr is not None:
        product -= tl.load(p_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty), mask=mask)


def _prepare_moments(x: Tensor, eps: float) -> Launch:
    batch, tokens, channels = as_rows(x).shape
    config, total = norm_config(channels), batch * tokens
    grid = (triton.cdiv(total, config.block["BLOCK_M"]),)
    return Launch(x.device, moments_kernel, grid, config, row_strides(x), total, tokens, channels, eps, **AS_WRITTEN)


def row_moments(x: Tensor, eps: float) -> Tensor:
    """Mean and 1 / deviation of each row [..., C] as [rows, 2] float32, to the bit as `modulated_norm` finds them.

    A kernel that normalises tiles of x within a matrix product takes them from here: summed over its own tiles they would
    differ in the last bits, and an unchanged input would no longer give exactly the stored output.
    """
    out = torch.empty(x.numel() // x.shape[-1], 2, dtype=torch.float32, device=x.device)
    if out.numel():
        MOMENTS.obtain((layout_of(x), eps), partial(_prepare_moments, x, eps))(x, out)
    return out


def prologue(x: Tensor, scale: Tensor | None, shift: Tensor | None, block_m: int) -> tuple[list[Any], bool]:
    """The strides of what modulates x (None for each where nothing does), and whether ONE_BATCH holds."""
    if scale is None or shift is None:
        return [None, None], False
    strides = [modulation_strides(modulation, x) for modulation in (scale, shift)]
    return strides, as_rows(x).shape[1] % block_m == 0 and not any(token for _, token, _ in strides)


def prepare_project(
    x: Tensor, b: Tensor, p: Tensor | None, out: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Launch:
    """The launch on (x, moments, scale, shift, b, p, out) that writes B x, less p where it is given, into `out` [..., R]."""
    batch, tokens, channels = as_rows(x).shape
    total, ranks = batch * tokens, b.shape[0]
    limits = machine(x.device)
    strides, one_batch = prologue(x, scale, shift, row_block(total, x.dtype, limits)[0])

    def make(config: Config) -> Launch:
        grid = (triton.cdiv(total, config.block["BLOCK_M"]) * triton.cdiv(ranks, config.block["BLOCK_R"]),)
        return Launch(
            x.device, project_kernel, grid, config, row_strides(x), *strides, total, tokens, channels, ranks,
            ONE_BATCH=one_batch, PRECISION=input_precision(x),
        )  # fmt: skip

    def trial() -> list[Any]:
        moments = torch.zeros(total, 2, dtype=torch.float32, device=x.device) if scale is not None else None
        return [x, moments, scale, shift, b, p, empty_rows(out)]

    key = ("project", total, channels, ranks, x.dtype, x.device, scale is not None, p is not None)
    return fastest(key, project_configs(total, ranks, x.dtype, limits), make, trial)
