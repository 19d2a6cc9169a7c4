"""x + sum_i gate_i * value_i in one pass over all of them."""

from collections.abc import Sequence
from functools import partial

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
    layout_of,
    modulation_strides,
    row_strides,
)
from stepgraph.triton_kernels.settings import MAX_VALUES
from stepgraph.triton_kernels.tiles import load_modulation, load_tile, store_tile, stream_configs, tile

LAUNCHES = Launches[Launch]()


@triton.jit
def gated_residual_kernel(
    x_ptr, gate_ptrs, value_ptrs, out_ptr, x_strides, gate_strides, value_strides, tokens, channels, COUNT: tl.constexpr,
    PER_TOKEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per tile of one batch. Unless PER_TOKEN, a tile's tokens share their gates."""
    batch, token, channel, mask = tile(tokens, channels, BLOCK_N, BLOCK_C)
    total = load_tile(x_ptr, x_strides, batch, token, channel, mask).to(tl.float32)
    for i in tl.static_range(COUNT):
        value = load_tile(value_ptrs[i], value_strides[i], batch, token, channel, mask).to(tl.float32)
        if PER_TOKEN:
            gate = load_modulation(gate_ptrs[i], gate_strides[i], batch, token, channel, mask)
        else:
            gate = load_modulation(gate_ptrs[i], gate_strides[i], batch, 0, channel, channel < channels)
        total = tl.fma(gate, value, total)
    store_tile(out_ptr, batch * tokens + token, channels, channel, total, mask)


def _prepare(x: Tensor, gates: Sequence[Tensor], values: Sequence[Tensor]) -> Launch:
    """Of at most MAX_VALUES values."""
    batch, tokens, channels = as_rows(x).shape
    gate_strides = tuple(modulation_strides(gate, x) for gate in gates)
    per_token = any(token for _, token, _ in gate_strides)

    def make(config: Config) -> Launch:
        blocks = triton.cdiv(tokens, config.block["BLOCK_N"]) * triton.cdiv(channels, config.block["BLOCK_C"])
        return Launch(
            x.device, gated_residual_kernel, (batch * blocks,), config, row_strides(x), gate_strides,
            tuple(row_strides(value) for value in values), tokens, channels, COUNT=len(values), PER_TOKEN=per_token,
        )  # fmt: skip

    key = ("gated_residual", batch, tokens, channels, len(values), per_token, x.dtype, x.device)
    # The second pass reads what it writes to.
    return fastest(key, stream_configs(channels), make, lambda: (x, tuple(gates), tuple(values), empty_rows(x)))


def gated_residual(x: Tensor, gates: list[Tensor], values: list[Tensor], out: Tensor | None = None) -> Tensor:
    """See `stepgraph.ops.gated_residual`; a run of more than MAX_VALUES values takes several passes.

    The result is written to `out`, if given; later passes read there what earlier ones wrote, each element by who writes it.
    """
    out = empty_rows(x) if out is None else out
    for start in range(0, len(values) if x.numel() else 0, MAX_VALUES):
        some, their = values[start : start + MAX_VALUES], gates[start : start + MAX_VALUES]
        launch = LAUNCHES.obtain(layout_of(x, *their, *some), partial(_prepare, x, their, some))
        launch(x, tuple(their), tuple(some), out)
        x = out
    return out
