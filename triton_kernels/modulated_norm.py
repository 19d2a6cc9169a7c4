"""LayerNorm and the adaLN modulation in one pass over x."""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.triton_kernels.launch import (
    Launch,
    Launches,
    as_rows,
    empty_rows,
    layout_of,
    modulation_strides,
    row_strides,
)
from stepgraph.triton_kernels.tiles import AS_WRITTEN, load_modulation, load_rows_and_moments, modulate, norm_config, store_tile

LAUNCHES = Launches[Launch]()


@triton.jit
def modulated_norm_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, x_strides, scale_strides, shift_strides, total, tokens, channels, eps,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M of the `total` rows."""
    row, channel, mask, x, mean, rstd = load_rows_and_moments(x_ptr, x_strides, total, tokens, channels, eps, BLOCK_M, BLOCK_C)
    batch, token = (row // tokens)[:, None], (row % tokens)[:, None]
    scale = load_modulation(scale_ptr, scale_strides, batch, token, channel[None, :], mask)
    shift = load_modulation(shift_ptr, shift_strides, batch, token, channel[None, :], mask)
    modulated = modulate(x, mean[:, None], rstd[:, None], scale, shift)
    store_tile(out_ptr, row[:, None], channels, channel[None, :], modulated, mask)


def _prepare(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Launch:
    batch, tokens, channels = as_rows(x).shape
    config, total = norm_config(channels), batch * tokens
    return Launch(
        x.device, modulated_norm_kernel, (triton.cdiv(total, config.block["BLOCK_M"]),), config, row_strides(x),
        modulation_strides(scale, x), modulation_strides(shift, x), total, tokens, channels, eps, **AS_WRITTEN,
    )  # fmt: skip


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """See `stepgraph.ops.modulated_norm`."""
    out = empty_rows(x)
    if out.numel():
        layout = (layout_of(x, scale, shift), eps)
        LAUNCHES.obtain(layout, partial(_prepare, x, scale, shift, eps))(x, scale, shift, out)
    return out
