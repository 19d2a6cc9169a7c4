"""sum_i c_i * value_i in one pass, with coefficients read on the device: forecasts from stored values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.triton_kernels.launch import Config, as_rows, fastest, launch, row_strides
from stepgraph.triton_kernels.tiles import flat_configs, load_tile, store_tile, stream_configs, tile


@triton.jit
def linear_combination_kernel(
    value_ptrs, value_strides, coefficient_ptr, out_ptr, tokens, channels, COUNT: tl.constexpr, CONSTANT: tl.constexpr,
    PER_CHANNEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per tile of one batch; CONSTANT: the last coefficient stands alone."""
    batch, token, channel, mask = tile(tokens, channels, BLOCK_N, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for i in tl.static_range(COUNT + CONSTANT):
        if PER_CHANNEL:
            coefficient = tl.load(coefficient_ptr + i * channels + channel, mask=channel < channels, other=0.0)
        else:
            coefficient = tl.load(coefficient_ptr + i)
        if i < COUNT:
            total += coefficient * load_tile(value_ptrs[i], value_strides[i], batch, token, channel, mask).to(tl.float32)
        else:
            total += coefficient
    store_tile(out_ptr, batch * tokens + token, channels, channel, total, mask)


def linear_combination(values: list[Tensor], coefficients: Tensor) -> Tensor:
    """See `stepgraph.ops.linear_combination`."""
    out = torch.empty_like(values[0], memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    per_channel = coefficients.ndim == 2
    # Where channels do not matter, neither does where a row ends: narrow latents fill wide tiles.
    flat = not per_channel and all(value.is_contiguous() for value in values)
    viewed = [value.view(-1) if flat else value for value in values]
    batch, tokens, channels = as_rows(viewed[0]).shape if not flat else (1, 1, out.numel())

    def run(config: Config) -> None:
        blocks = triton.cdiv(tokens, config.block["BLOCK_N"]) * triton.cdiv(channels, config.block["BLOCK_C"])
        launch(
            out.device, linear_combination_kernel, (batch * blocks,), config, tuple(viewed),
            tuple((0, 0) if flat else row_strides(value) for value in viewed), coefficients, out, tokens, channels,
            COUNT=len(values), CONSTANT=len(coefficients) - len(values), PER_CHANNEL=per_channel,
        )  # fmt: skip

    key = ("linear_combination", batch, tokens, channels, coefficients.shape, len(values), out.dtype, out.device)
    run(fastest(key, flat_configs() if flat else stream_configs(channels), run))
    return out
