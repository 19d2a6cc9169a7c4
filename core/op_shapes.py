"""Which arguments belong together: the rules of shapes, dtypes and devices that every provider of an operation relies on.

Each function is called like the operation of its name, with real or fake tensors, and returns what is wrong and what is
expected; empty where nothing is. What a provider's own kernels cannot do is the provider's to say. The reference takes more
than these rules allow (it broadcasts and promotes as torch does), or raises its own error.

B batch, N tokens, C channels, R rank. Kernels see a tensor [..., C] as rows of channels, [B, N, C]: one of more than three
dimensions must be contiguous for that, of others the batches and tokens may lie anywhere. That channels lie side by side is
seen to before a provider is asked (`ops.Op.register`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def lowrank_input(x: Tensor, b: Tensor) -> str:
    """See `ops.lowrank_input`."""
    return _one_device([x, b]) or _one_dtype([x, b]) or _rows("x", x) or _factor(x, b)


def lowrank_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> str:  # fmt: skip
    """See `ops.lowrank_delta`."""
    ends = [tensor for tensor in (scale, shift, gate, residual) if tensor is not None]
    reason = (
        _pair("scale", scale, "shift", shift) or _pair("gate", gate, "residual", residual)
        or _one_device([x, *y, p, *a, b, *ends]) or _one_dtype([x, *y, *a, b, *ends])
        or _rows("x", x) or _factor(x, b) or _maps(x, y, p, a, b)
    )  # fmt: skip
    if not reason and scale is not None and shift is not None:
        reason = _modulation("scale", scale, x) or _modulation("shift", shift, x)
    if not reason and gate is not None and residual is not None:
        reason = _epilogue(y, gate, residual)
    return reason


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> str:
    """See `ops.modulated_norm`."""
    tensors = [x, scale, shift]
    return (
        _one_device(tensors) or _one_dtype(tensors) or _rows("x", x)
        or _modulation("scale", scale, x) or _modulation("shift", shift, x)
    )  # fmt: skip


def gated_residual(x: Tensor, gates: list[Tensor], values: list[Tensor]) -> str:
    """See `ops.gated_residual`."""
    if not 0 < len(gates) == len(values):
        return f"{len(gates)} gates for {len(values)} values; expected as many, and at least one"
    tensors = [x, *gates, *values]
    reason = _one_device(tensors) or _one_dtype(tensors) or _rows("x", x)
    for gate, value in zip(gates, values, strict=True):
        reason = reason or _shape("a value", value, x.shape) or _rows("a value", value) or _modulation("a gate", gate, x)
    return reason


def linear_combination(values: list[Tensor], coefficients: Tensor) -> str:
    """See `ops.linear_combination`."""
    if not values:
        return "0 values; expected at least one"
    first = values[0]
    reason = _one_device([*values, coefficients]) or _one_dtype(values)
    for value in values:
        reason = reason or _shape("a value", value, first.shape) or _rows("a value", value)
    return reason or _coefficients(values, coefficients)


def per_batch(modulation: Tensor, x: Tensor) -> bool:
    """Whether a modulation [B, C] stands for [B, 1, C]: x is [B, N, C]."""
    return modulation.ndim == 2 and x.ndim == 3


def accumulated(x: Tensor) -> torch.dtype:
    """The dtype that is accumulated in, which p and the coefficients are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _one_device(tensors: Sequence[Tensor]) -> str:
    device = tensors[0].device
    if all(tensor.device == device for tensor in tensors):
        return ""
    return f"tensors on {', '.join(sorted({str(tensor.device) for tensor in tensors}))}; expected one device"


def _one_dtype(tensors: Sequence[Tensor]) -> str:
    dtype = tensors[0].dtype
    if all(tensor.dtype == dtype for tensor in tensors):
        return ""
    return f"dtypes {', '.join(sorted({str(tensor.dtype) for tensor in tensors}))}; expected one dtype"


def _shape(name: str, tensor: Tensor, expected: Sequence[int]) -> str:
    return "" if tensor.shape == torch.Size(expected) else f"{name} is {list(tensor.shape)}; expected {list(expected)}"


def _rows(name: str, tensor: Tensor) -> str:
    """Whether a tensor can be seen as rows of channels."""
    if not tensor.ndim or not tensor.shape[-1]:
        return f"{name} is {list(tensor.shape)}; expected channels, [..., C]"
    if tensor.ndim > 3 and not tensor.is_contiguous():
        return f"{name} has {tensor.ndim} dimensions and is not contiguous; expected at most 3, or contiguous"
    return ""


def _modulation(name: str, modulation: Tensor, x: Tensor) -> str:
    """Whether a scale, shift or gate broadcasts against x."""
    if x.ndim > 3:
        return f"{name} for {x.ndim} dimensions {list(x.shape)}; expected at most 3"
    shape = modulation.shape
    if per_batch(modulation, x):
        shape = torch.Size((shape[0], 1, shape[1]))
    if len(shape) <= x.ndim and all(size in (1, whole) for size, whole in zip(reversed(shape), reversed(x.shape))):
        return ""
    return f"{name} {list(modulation.shape)} does not broadcast against {list(x.shape)}; expected [B, C] or [B, N, C]"


def _pair(name: str, one: Tensor | None, other_name: str, other: Tensor | None) -> str:
    if (one is None) == (other is None):
        return ""
    return f"only one of {name} and {other_name} is given; expected both or neither"


def _factor(x: Tensor, b: Tensor) -> str:
    if b.ndim == 2 and b.shape[0] and b.shape[1] == x.shape[-1]:
        return ""
    return f"b {list(b.shape)} does not fit x {list(x.shape)}; expected [R, {x.shape[-1]}]"


def _maps(x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor) -> str:
    """Whether the maps' factors and stored values fit x, b and each other."""
    if not 0 < len(y) == len(a):
        return f"{len(y)} stored outputs for {len(a)} maps; expected as many, and at least one"
    if any(map_a.ndim != 2 or 0 in map_a.shape for map_a in a) or sum(map_a.shape[1] for map_a in a) != b.shape[0]:
        return f"a {[list(map_a.shape) for map_a in a]}; expected [C_out, r] each, with r that add up to b's {b.shape[0]}"
    if p.dtype != accumulated(x):
        return f"p is {p.dtype}; expected {accumulated(x)}"
    reason = _shape("p", p, (*x.shape[:-1], b.shape[0])) or _rows("p", p)
    for stored, map_a in zip(y, a, strict=True):
        reason = (
            reason or _shape("a stored output", stored, (*x.shape[:-1], map_a.shape[0])) or _rows("a stored output", stored)
        )
    return reason


def _epilogue(y: list[Tensor], gate: Tensor, residual: Tensor) -> str:
    """Whether the gate and the residual fit the one map."""
    if len(y) != 1:
        return f"gate and residual for {len(y)} maps; expected one"
    return _shape("residual", residual, y[0].shape) or _rows("residual", residual) or _modulation("gate", gate, residual)


def _coefficients(values: list[Tensor], coefficients: Tensor) -> str:
    """Whether there is one for each value, or one more, in the dtype that is accumulated in."""
    k, channels = len(values), values[0].shape[-1]
    if coefficients.dtype != accumulated(values[0]):
        return f"coefficients are {coefficients.dtype}; expected {accumulated(values[0])}"
    lead, rest = (coefficients.shape or (0,))[0], tuple(coefficients.shape[1:])
    if lead not in (k, k + 1) or rest not in ((), (channels,)):
        return f"coefficients {list(coefficients.shape)} for {k} values; expected [k] or [k, {channels}], k = {k} or {k + 1}"
    return ""
