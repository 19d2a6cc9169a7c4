"""The fused operations: each is first a short torch function, and providers do the same faster.

The reference is an operation's meaning, its schema and its fallback. Providers register on it in `stepgraph.op_registry`. Which
arguments belong together is the operation's to say, once for all providers: `op_shapes`.

B batch, N tokens, C channels, R rank. Products with factors and linear combinations accumulate in at least float32;
`modulated_norm` and `gated_residual` round after every operation, as the eager model does. Tokens are the second dimension of
what has three; a modulation (scale, shift, gate) is [B, C], or what broadcasts against [B, N, C].
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import stepgraph.op_shapes as op_shapes
from stepgraph.checked import checked
from stepgraph.errors import CompileError as CompileError
from stepgraph.errors import OpError
from stepgraph.op_registry import (
    INTO,
    LIBRARY,
    OPS,
    PACKAGES,
    PRIORITY,
    REFERENCE,
    TUNED,
    Op,
    Provider,
    forced,
    forget_choices,
    load_providers,
    operation,
)

__all__ = [
    "INTO",
    "LIBRARY",
    "OPS",
    "PACKAGES",
    "PRIORITY",
    "REFERENCE",
    "TUNED",
    "Op",
    "Provider",
    "forced",
    "forget_choices",
    "gated_residual",
    "linear_combination",
    "load_providers",
    "lowrank_delta",
    "lowrank_input",
    "modulated_norm",
    "rows",
]


@checked
def rows(modulation: Tensor, x: Tensor) -> Tensor:
    """A modulation [B, C] as it broadcasts over the tokens of `x` [B, N, C]; others as they are."""
    return modulation.unsqueeze(1) if op_shapes.per_batch(modulation, x) else modulation


def _wide(x: Tensor) -> Tensor:
    """In the dtype that is accumulated in."""
    return x if x.dtype == torch.float64 else x.float()


def _fake_input(x: Tensor, b: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], b.shape[0]), dtype=op_shapes.accumulated(x))


@operation(_fake_input, op_shapes.lowrank_input)
def lowrank_input(x: Tensor, b: Tensor) -> Tensor:
    """The input of linear maps in rank space, p = B x: what is cached in place of x (docs/design.md, decision 6).

    Args:
        x: [..., C_in].
        b: [R, C_in], the B of all maps that read x, one below the other.

    Returns:
        [..., R] float32 whatever x's dtype (float64 for float64): rounded to x's dtype it would no longer cancel.
    """
    return F.linear(_wide(x), _wide(b))


def _fake_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(stored, memory_format=torch.contiguous_format) for stored in y]


@operation(_fake_delta, op_shapes.lowrank_delta)
def lowrank_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """y_i + A_i (B_i x - p_i): the stored outputs of linear maps of one input, corrected for what the input changed by.

    Increment-calibrated caching (arXiv 2505.05829) in rank space: p_i = B_i C(x) is stored instead of C(x), so that nothing
    is subtracted that is not of rank r, and an unchanged x gives y to the last bit.

    Args:
        x: [..., C_in].
        y: The stored outputs, [..., C_out_i] each.
        p: [..., R] float32, what `lowrank_input` gave for the stored input.
        a: [C_out_i, r_i] each; the r_i add up to R.
        b: [R, C_in], the B_i one below the other: one matrix product for all maps.
        scale: With `shift`: x is first normalised and modulated as by `modulated_norm`.
        shift: See `scale`.
        eps: Of that normalisation.
        gate: With `residual`, and one map only: residual + gate * result, as by `gated_residual`.
        residual: [..., C_out].

    Returns:
        One tensor per map, in the shape and dtype of its y.

    Raises:
        OpError: Only one of scale and shift, or of gate and residual, is given.
    """
    if (scale is None) != (shift is None) or (gate is None) != (residual is None):
        raise OpError("scale goes with shift and gate with residual; only one of a pair is given")
    if scale is not None and shift is not None:
        x = modulated_norm.reference(x, scale, shift, eps)
    t = lowrank_input.reference(x, b) - p
    parts = t.split([map_a.shape[1] for map_a in a], dim=-1)
    corrected = [stored + F.linear(part.to(stored.dtype), map_a) for stored, part, map_a in zip(y, parts, a, strict=True)]
    if gate is not None and residual is not None:
        corrected = [gated_residual.reference(residual, [gate], corrected)]
    return corrected


def _fake_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operation(_fake_norm, op_shapes.modulated_norm)
def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without affine parameters, then the adaLN modulation: norm(x) * (1 + scale) + shift.

    Args:
        x: [B, N, C].
        scale: [B, C], or broadcasting against x.
        shift: Likewise.
        eps: Of the normalisation.
    """
    return F.layer_norm(x, (x.shape[-1],), None, None, eps) * (1 + rows(scale, x)) + rows(shift, x)


def _fake_residual(x: Tensor, gates: list[Tensor], values: list[Tensor]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operation(_fake_residual, op_shapes.gated_residual)
def gated_residual(x: Tensor, gates: list[Tensor], values: list[Tensor]) -> Tensor:
    """Gated residual updates, x + sum_i gate_i * value_i, in this order: a run of sites in one pass.

    Args:
        x: [B, N, C].
        gates: [B, C] each, or broadcasting against x.
        values: [B, N, C] each.
    """
    for gate, value in zip(gates, values, strict=True):
        # In this order the result lies in memory as the value does, whatever x is a view of.
        x = rows(gate, x) * value + x
    return x


def _fake_combination(values: list[Tensor], coefficients: Tensor) -> Tensor:
    return torch.empty_like(values[0], memory_format=torch.contiguous_format)


@operation(_fake_combination, op_shapes.linear_combination)
def linear_combination(values: list[Tensor], coefficients: Tensor) -> Tensor:
    """sum_i c_i * value_i, and a constant where there is one coefficient more than values: a forecast from stored values.

    Args:
        values: k tensors [..., C] of one shape and dtype.
        coefficients: [k] or [k + 1], or one row per channel behind it: [k, C] or [k + 1, C]; float32 (float64 for float64).

    Returns:
        In the shape and dtype of the values.

    Raises:
        OpError: The coefficients are neither as many as the values nor one more.
    """
    count = len(coefficients) if coefficients.ndim else 0
    if count - len(values) not in (0, 1) or not count:
        raise OpError(f"{count} coefficients for {len(values)} values; expected as many, or one more")
    total = coefficients[0] * _wide(values[0])
    for coefficient, value in zip(coefficients[1:], values[1:], strict=False):
        total = total + coefficient * _wide(value)
    if len(coefficients) > len(values):
        total = total + coefficients[-1]
    return total.to(values[0].dtype)
