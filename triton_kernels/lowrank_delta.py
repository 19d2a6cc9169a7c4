"""y_i + A_i (B_i x - p_i): both products in one kernel, or in two where there are few rows or high ranks."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.triton_kernels.launch import (
    Config,
    as_rows,
    fastest,
    input_precision,
    launch,
    machine,
    modulation_strides,
    power_of_2,
    row_strides,
)
from stepgraph.triton_kernels.lowrank_tiles import MIN_BLOCK, expand_configs, row_block, single_configs, takes_single
from stepgraph.triton_kernels.projection import project, prologue, run_project
from stepgraph.triton_kernels.tiles import load_modulation, load_tile, store_tile


@triton.jit
def finish(result, gate_ptr, gate_strides, residual, out_ptr, row, column, mask, tokens, columns):
    """Store `result` [BLOCK_M, BLOCK_N], or residual + gate * result, as rows `row` and columns `column` of out."""
    if gate_ptr is not None:
        gate = load_modulation(gate_ptr, gate_strides, (row // tokens)[:, None], (row % tokens)[:, None], column[None, :], mask)
        result = tl.fma(gate, result, residual.to(tl.float32))
    store_tile(out_ptr, row[:, None], columns, column[None, :], result, mask)


@triton.jit
def delta_kernel(
    x_ptr, x_strides, moments_ptr, scale_ptr, scale_strides, shift_ptr, shift_strides, b_ptrs, p_ptrs, p_stride, a_ptrs, y_ptrs,
    y_strides, gate_ptr, gate_strides, residual_ptr, residual_strides, out_ptrs, ranks, columns, total, tokens, channels,
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
    t_ptrs, t_stride, a_ptrs, y_ptrs, y_strides, gate_ptr, gate_strides, residual_ptr, residual_strides, out_ptrs, ranks,
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


def _parts(stacked: Tensor, ranks: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    """What belongs to each map."""
    return tuple(stacked.split(ranks, dim=dim))


def _after(gate: Tensor | None, residual: Tensor | None) -> list[Any]:
    """The kernel arguments of the epilogue; None for each where there is none."""
    if gate is None or residual is None:
        return [None] * 4
    return [gate, modulation_strides(gate, residual), residual, row_strides(residual)]


def _run_single(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, before: list[Any], one_batch: bool, after: list[Any],
    outs: list[Tensor],
) -> None:  # fmt: skip
    batch, tokens, channels = as_rows(x).shape
    total, ranks = batch * tokens, tuple(factor.shape[1] for factor in a)
    columns = tuple(factor.shape[0] for factor in a)
    padded = tuple(max(MIN_BLOCK, power_of_2(rank)) for rank in ranks)

    def run(config: Config) -> None:
        grid = (triton.cdiv(total, config.block["BLOCK_M"]) * len(a) * config.block["SPLITS"],)
        launch(
            x.device, delta_kernel, grid, config, x, row_strides(x), *before, _parts(b, ranks, 0), _parts(p, ranks, -1),
            b.shape[0], tuple(a), tuple(y), tuple(row_strides(stored) for stored in y), *after, tuple(outs), ranks, columns,
            total, tokens, channels, MAPS=len(a), RANKS=padded, ONE_BATCH=one_batch, PRECISION=input_precision(x),
        )  # fmt: skip

    key = ("delta", total, channels, ranks, columns, x.dtype, x.device, before[0] is not None, after[0] is not None)
    run(fastest(key, single_configs(total, ranks, x.dtype, machine(x.device)), run))


def _run_expand(t: Tensor, y: list[Tensor], a: list[Tensor], after: list[Any], outs: list[Tensor]) -> None:
    batch, tokens, _ = as_rows(y[0]).shape
    total, ranks = batch * tokens, tuple(factor.shape[1] for factor in a)
    columns = tuple(factor.shape[0] for factor in a)

    def run(config: Config) -> None:
        blocks = triton.cdiv(max(columns), config.block["BLOCK_N"])
        grid = (triton.cdiv(total, config.block["BLOCK_M"]) * blocks, len(a))
        launch(
            t.device, expand_kernel, grid, config, _parts(t, ranks, -1), t.shape[-1], tuple(a), tuple(y),
            tuple(row_strides(stored) for stored in y), *after, tuple(outs), ranks, columns, total, tokens, MAPS=len(a),
            PRECISION=input_precision(t),
        )  # fmt: skip

    key = ("expand", total, ranks, columns, t.dtype, t.device, after[0] is not None)
    run(fastest(key, expand_configs(total, t.dtype, machine(t.device)), run))


def lowrank_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """See `stepgraph.ops.lowrank_delta`."""
    outs = [torch.empty_like(stored, memory_format=torch.contiguous_format) for stored in y]
    rows, limits = x.numel() // x.shape[-1], machine(x.device)
    if rows == 0:
        return outs
    before, one_batch = prologue(x, scale, shift, eps, row_block(rows, x.dtype, limits)[0])
    after = _after(gate, residual)
    if takes_single(rows, tuple(factor.shape[1] for factor in a), x.dtype, limits):
        _run_single(x, y, p, a, b, before, one_batch, after, outs)
        return outs
    t = torch.empty(p.shape, dtype=x.dtype, device=x.device)
    _run_expand(run_project(x, b, p, t, before, one_batch), y, a, after, outs)
    return outs
