"""LayerNorm and the adaLN modulation in one pass over x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.triton_kernels.launch import as_rows, launch, modulation_strides, row_strides
from stepgraph.triton_kernels.tiles import load_modulation, load_rows_and_moments, modulate, norm_config, store_tile


@triton.jit
def modulated_norm_kernel(
    x_ptr, x_strides, scale_ptr, scale_strides, shift_ptr, shift_strides, out_ptr, total, tokens, channels, eps,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M of the `total` rows."""
    row, channel, mask, x, mean, rstd = load_rows_and_moments(x_ptr, x_strides, total, tokens, channels, eps, BLOCK_M, BLOCK_C)
    batch, token = (row // tokens)[:, None], (row % tokens)[:, None]
    scale = load_modulation(scale_ptr, scale_strides, batch, token, channel[None, :], mask)
    shift = load_modulation(shift_ptr, shift_strides, batch, token, channel[None, :], mask)
    modulated = modulate(x, mean[:, None], rstd[:, None], scale, shift)
    store_tile(out_ptr, row[:, None], channels, channel[None, :], modulated, mask)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """See `stepgraph.ops.modulated_norm`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    batch, tokens, channels = as_rows(x).shape
    if (total := batch * tokens) == 0:
        return out
    config = norm_config(channels)
    launch(
        x.device, modulated_norm_kernel, (triton.cdiv(total, config.block["BLOCK_M"]),), config, x, row_strides(x), scale,
        modulation_strides(scale, x), shift, modulation_strides(shift, x), out, total, tokens, channels, eps,
    )  # fmt: skip
    return out
