"""y_i + A_i (B_i x - p_i): both products in one kernel, or in two where there are few rows or high ranks."""

from dataclasses import dataclass
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
    power_of_2,
    precision_setting,
    row_strides,
)
from stepgraph.triton_kernels.lowrank_tiles import MIN_BLOCK, expand_configs, row_block, single_configs, takes_single
from stepgraph.triton_kernels.projection import prepare_project, project, prologue, row_moments
from stepgraph.triton_kernels.tiles import load_modulation, load_tile, store_tile

LAUNCHES = Launches["Correction"]()


@triton.jit
def finish(result, gate_ptr, gate_strides, residual, out_ptr, row, column, mask, tokens, columns):
    """Store `result` [BLOCK_M, BLOCK_N], or residual + gate * result, as rows `row` and columns `column` of out."""
    if gate_ptr is not None:
        gate = load_modulation(gate_ptr, gate_strides, (row // tokens)[:, None], (row % tokens)[:, None], column[None, :], mask)
        result = tl.fma(gate, result, residual.to(tl.float32))
    store_tile(out_ptr, row[:, None], columns, column[None, :], result, mask)


@triton.jit
def delta_kernel(
    x_ptr, moments_ptr, scale_ptr, shift_ptr, b_ptrs, p_ptrs, a_ptrs, y_ptrs, gate_ptr, residual_ptr, out_ptrs, x_strides,
    scale_strides, shift_strides, p_stride, y_strides, gate_strides, residual_strides, ranks, columns, total, tokens, channels,
    MAPS: tl.constexpr, RANKS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, ONE_BATCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M rows, map and share (one of SPLITS) of the map's columns; RANKS are the padded ranks.

    Programs of the same rows are side by side: x stays in the cache. Each map's code is its own, for its rank.
    """
    first = (tl.program_id(0) // (MAPS * SPLITS)).to(tl.int64) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    batch, token = (row // tokens)[:, None], (row % tokens)[:, None]
    share = tl.program_id(0) % SPLITS
    for i in tl.static_range(MAPS):
        if (tl.program_id(0) // SPLITS) % MAPS == i:
            rank_at = tl.arange(0, RANKS[i])
            in_rank = rank_at < ranks[i]
            change = project(
                x_ptr, x_strides, moments_ptr, scale_ptr, scale_strides, shift_ptr, shift_strides, b_ptrs[i], first, row,
                total, tokens, channels, rank_at, ranks[i], BLOCK_K, ONE_BATCH, PRECISION,
            )  # fmt: skip
            p_at = p_ptrs[i] + row[:, None] * p_stride + rank_at[None, :]
            change -= tl.load(p_at, mask=(row < total)[:, None] & in_rank[None, :], other=0.0)
            change_low = change.to(y_ptrs[i].dtype.element_ty)
            per_share = tl.cdiv(tl.cdiv(columns[i], BLOCK_N), SPLITS) * BLOCK_N
            last = min((share + 1) * per_share, columns[i])
            column = share * per_share + tl.arange(0, BLOCK_N)
            mask = (row < total)[:, None] & (column < last)[None, :]
            y = load_tile(y_ptrs[i], y_strides[i], batch, token, column[None, :], mask)
            residual = y
            if residual_ptr is not None:
                residual = load_tile(residual_ptr, residual_strides, batch, token, column[None, :], mask)
            for start in range(share * per_share, last, BLOCK_N):
                column = start + tl.arange(0, BLOCK_N)
                mask = (row < total)[:, None] & (column < last)[None, :]
                a_at = a_ptrs[i] + column.to(tl.int64)[None, :] * ranks[i] + rank_at[:, None]
                a = tl.load(a_at, mask=in_rank[:, None] & (column < last)[None, :], other=0.0)
                # The pipeliner takes care of a alone; what is only streamed is loaded one tile ahead by hand.
                ahead = column + BLOCK_N
                ahead_mask = (row < total)[:, None] & (ahead < last)[None, :]
                y_ahead = load_tile(y_ptrs[i], y_strides[i], batch, token, ahead[None, :], ahead_mask)
                residual_ahead = y_ahead
                if residual_ptr is not None:
                    residual_ahead = load_tile(residual_ptr, residual_strides, batch, token, ahead[None, :], ahead_mask)
                result = tl.dot(change_low, a, y.to(tl.float32), input_precision=PRECISION)
                finish(result, gate_ptr, gate_strides, residual, out_ptrs[i], row, column, mask, tokens, columns[i])
                y, residual = y_ahead, residual_ahead


@triton.jit
def expand_kernel(
    t_ptrs, a_ptrs, y_ptrs, gate_ptr, residual_ptr, out_ptrs, t_stride, y_strides, gate_strides, residual_strides, ranks,
    columns, total, tokens, MAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M rows, BLOCK_N columns (the grid's first dimension) and map: y + A t."""
    row_blocks = tl.cdiv(total, BLOCK_M)
    row = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, token = (row // tokens)[:, None], (row % tokens)[:, None]
    for i in tl.static_range(MAPS):
        if tl.program_id(1) == i:
            mask = (row < total)[:, None] & (column < columns[i])[None, :]
            y = load_tile(y_ptrs[i], y_strides[i], batch, token, column[None, :], mask)
            residual = y
            if residual_ptr is not None:
                residual = load_tile(residual_ptr, residual_strides, batch, token, column[None, :], mask)
            result = y.to(tl.float32)
            for start in range(0, ranks[i], BLOCK_K):
                rank_at = start + tl.arange(0, BLOCK_K)
                in_rank = rank_at < ranks[i]
                t_at = t_ptrs[i] + row[:, None] * t_stride + rank_at[None, :]
                t = tl.load(t_at, mask=(row < total)[:, None] & in_rank[None, :], other=0.0)
                a_at = a_ptrs[i] + column.to(tl.int64)[None, :] * ranks[i] + rank_at[:, None]
                a = tl.load(a_at, mask=in_rank[:, None] & (column < columns[i])[None, :], other=0.0)
                result = tl.dot(t, a, result, input_precision=PRECISION)
            finish(result, gate_ptr, gate_strides, residual, out_ptrs[i], row, column, mask, tokens, columns[i])


@dataclass(frozen=True)
class Correction:
    """What is launched for one layout of arguments.

    Attributes:
        first: B x - p into memory of its own, where there are two kernels.
        last: Both products in one kernel, or the second.
        ranks: Of the maps.
    """

    first: Launch | None
    last: Launch
    ranks: tuple[int, ...]


def _parts(stacked: Tensor, ranks: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    """What belongs to each map."""
    return (stacked,) if len(ranks) == 1 else tuple(stacked.split(ranks, dim=dim))


def _after(gate: Tensor | None, residual: Tensor | None) -> list[Any]:
    """The strides of the epilogue; None for each where there is none."""
    if gate is None or residual is None:
        return [None, None]
    return [modulation_strides(gate, residual), row_strides(residual)]


def _prepare_single(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None, shift: Tensor | None,
    gate: Tensor | None, residual: Tensor | None,
) -> Correction:  # fmt: skip
    batch, tokens, channels = as_rows(x).shape
    total, ranks = batch * tokens, tuple(factor.shape[1] for factor in a)
    columns, limits = tuple(factor.shape[0] for factor in a), machine(x.device)
    padded = tuple(max(MIN_BLOCK, power_of_2(rank)) for rank in ranks)
    before, one_batch = prologue(x, scale, shift, row_block(total, x.dtype, limits)[0])

    def make(config: Config) -> Launch:
        grid = (triton.cdiv(total, config.block["BLOCK_M"]) * len(a) * config.block["SPLITS"],)
        return Launch(
            x.device, delta_kernel, grid, config, row_strides(x), *before, b.shape[0],
            tuple(row_strides(stored) for stored in y), *_after(gate, residual), ranks, columns, total, tokens, channels,
            MAPS=len(a), RANKS=padded, ONE_BATCH=one_batch, PRECISION=input_precision(x),
        )  # fmt: skip

    def trial() -> list[Any]:
        moments = torch.zeros(total, 2, dtype=torch.float32, device=x.device) if scale is not None else None
        outs = tuple(empty_rows(stored) for stored in y)
        return [
            x, moments, scale, shift, _parts(b, ranks, 0), _parts(p, ranks, -1), tuple(a), tuple(y), gate, residual, outs,
        ]  # fmt: skip

    key = ("delta", total, channels, ranks, columns, x.dtype, x.device, scale is not None, gate is not None)
    return Correction(None, fastest(key, single_configs(total, ranks, x.dtype, limits), make, trial), ranks)


def _prepare_two(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None, shift: Tensor | None,
    gate: Tensor | None, residual: Tensor | None,
) -> Correction:  # fmt: skip
    batch, tokens, _ = as_rows(x).shape
    total, ranks = batch * tokens, tuple(factor.shape[1] for factor in a)
    columns = tuple(factor.shape[0] for factor in a)

    def make(config: Config) -> Launch:
        blocks = triton.cdiv(max(columns), config.block["BLOCK_N"])
        grid = (triton.cdiv(total, config.block["BLOCK_M"]) * blocks, len(a))
        return Launch(
            x.device, expand_kernel, grid, config, b.shape[0], tuple(row_strides(stored) for stored in y),
            *_after(gate, residual), ranks, columns, total, tokens, MAPS=len(a), PRECISION=input_precision(x),
        )  # fmt: skip

    def trial() -> list[Any]:
        outs = tuple(empty_rows(stored) for stored in y)
        return [_parts(torch.zeros_like(p, dtype=x.dtype), ranks, -1), tuple(a), tuple(y), gate, residual, outs]

    first = prepare_project(x, b, p, torch.empty_like(p, dtype=x.dtype), scale, shift)
    key = ("expand", total, ranks, columns, x.dtype, x.device, gate is not None)
    return Correction(first, fastest(key, expand_configs(total, x.dtype, machine(x.device)), make, trial), ranks)


def lowrank_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """See `stepgraph.ops.lowrank_delta`."""
    outs = [empty_rows(stored) for stored in y]
    if p.numel() == 0:
        return outs

    def prepare() -> Correction:
        rows, ranks = x.numel() // x.shape[-1], tuple(factor.shape[1] for factor in a)
        single = takes_single(rows, ranks, x.dtype, machine(x.device))
        return (_prepare_single if single else _prepare_two)(x, y, p, a, b, scale, shift, gate, residual)

    ends = [tensor for tensor in (scale, shift, gate, residual) if tensor is not None]
    layout = (layout_of(x, p, b, *y, *a, *ends), len(a), scale is None, precision_setting(x))
    launches = LAUNCHES.obtain(layout, prepare)
    moments = None if scale is None else row_moments(x, eps)
    if launches.first is None:
        launches.last(
            x, moments, scale, shift, _parts(b, launches.ranks, 0), _parts(p, launches.ranks, -1), tuple(a), tuple(y), gate,
            residual, tuple(outs),
        )  # fmt: skip
        return outs
    t = torch.empty(p.shape, dtype=x.dtype, device=x.device)
    launches.first(x, moments, scale, shift, b, p, t)
    launches.last(_parts(t, launches.ranks, -1), tuple(a), tuple(y), gate, residual, tuple(outs))
    return outs
