"""sum_i c_i * value_i in one pass, with coefficients read on the device: forecasts from stored values."""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.triton_kernels.launch import Config, Launch, Launches, as_rows, empty_rows, fastest, layout_of, row_strides
from stepgraph.triton_kernels.tiles import flat_configs, load_tile, store_tile, stream_configs, tile

LAUNCHES = Launches[Launch]()


@triton.jit
def linear_combination_kernel(
    value_ptrs, coefficient_ptr, out_ptr, value_strides, tokens, channels, COUNT: tl.constexpr, CONSTANT: tl.constexpr,
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


def _prepare(values: list[Tensor], coefficients: Tensor, flat: bool) -> Launch:
    first, per_channel = values[0], coefficients.ndim == 2
    batch, tokens, channels = (1, 1, first.numel()) if flat else as_rows(first).shape

    def make(config: Config) -> Launch:
        blocks = triton.cdiv(tokens, config.block["BLOCK_N"]) * triton.cdiv(channels, config.block["BLOCK_C"])
        return Launch(
            first.device, linear_combination_kernel, (batch * blocks,), config,
            tuple((0, 0) if flat else row_strides(value) for value in values), tokens, channels,
            COUNT=len(values), CONSTANT=len(coefficients) - len(values), PER_CHANNEL=per_channel,
        )  # fmt: skip

    key = ("linear_combination", batch, tokens, channels, coefficients.shape, len(values), first.dtype, first.device)
    configs = flat_configs() if flat else stream_configs(channels)
    return fastest(key, configs, make, lambda: (tuple(values), coefficients, empty_rows(first)))


def linear_combination(values: list[Tensor], coefficients: Tensor) -> Tensor:
    """See `stepgraph.ops.linear_combination`."""
    out = empty_rows(values[0])
    if out.numel() == 0:
        return out

    def prepare() -> Launch:
        # Where channels do not matter, neither does where a row ends: narrow latents fill wide tiles.
        return _prepare(values, coefficients, coefficients.ndim == 1 and all(value.is_contiguous() for value in values))

    LAUNCHES.obtain(layout_of(*values, coefficients), prepare)(tuple(values), coefficients, out)
    return out
