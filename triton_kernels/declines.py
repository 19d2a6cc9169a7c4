"""For which arguments there is a Triton kernel: devices, dtypes, shapes and strides only, of real or fake tensors.

Each function is called like its operation and returns the reason why its kernel does not take the arguments; empty where it
does. What the reference would refuse too (shapes that do not fit together) is declined, so that its message is the one seen.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from stepgraph.triton_kernels.settings import MAX_CHANNELS, MAX_VALUES, interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter multiplies bfloat16's bit patterns as integers, and says nothing.
INTERPRETED = (torch.float32, torch.float16)
# Older ones have no matrix instructions for bfloat16, and Triton's code for them spills kilobytes.
LEAST_CAPABILITY = (8, 0)


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _device(tensors: Sequence[Tensor]) -> str:
    """Whether kernels run where these tensors are."""
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        return "the tensors are on different devices"
    if not _installed():
        return "triton is not installed"
    if device.type == "cpu":
        return "" if interpreting() else "the tensors are on the CPU, and triton's interpreter is off (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"the tensors are on {device.type!r}, not on a CUDA or HIP device"
    if interpreting():
        return "TRITON_INTERPRET is set: the interpreter is for tensors on the CPU"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = _capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return ""


def _dtypes(tensors: Sequence[Tensor]) -> str:
    """Whether they are of one dtype that kernels are there for."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES:
        return f"there is no kernel for {dtype}"
    other = next((tensor.dtype for tensor in tensors if tensor.dtype != dtype), None)
    if other:
        return f"the dtypes differ: {dtype} and {other}"
    wrong = tensors[0].device.type == "cpu" and dtype not in INTERPRETED
    return f"triton's interpreter computes wrongly with {dtype}" if wrong else ""


def _rows(name: str, tensor: Tensor) -> str:
    """Whether it is readable as [B, N, C] with channels side by side."""
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        return f"{name} has no channels"
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return f"{name}'s channels are not contiguous"
    if tensor.ndim > 3 and not tensor.is_contiguous():
        return f"{name} has {tensor.ndim} dimensions and is not contiguous"
    return ""


def _modulation(name: str, modulation: Tensor, x: Tensor) -> str:
    """Whether a scale, shift or gate broadcasts against x."""
    if x.ndim > 3:
        return f"a {name} needs tokens of at most three dimensions, not {x.ndim}"
    shape = modulation.shape
    if modulation.ndim == 2 and x.ndim == 3:
        shape = torch.Size((shape[0], 1, shape[1]))
    fits = len(shape) <= x.ndim and all(size in (1, full) for size, full in zip(reversed(shape), reversed(x.shape)))
    return "" if fits else f"{name} {list(modulation.shape)} does not broadcast against {list(x.shape)}"


def _first(*reasons: str) -> str:
    return next((reason for reason in reasons if reason), "")


def lowrank_input(x: Tensor, b: Tensor) -> str:
    """See `stepgraph.ops.lowrank_input`."""
    fits = b.ndim == 2 and x.ndim > 0 and x.shape[-1] == b.shape[1] and b.shape[0] > 0
    return _first(
        _device([x, b]),
        _dtypes([x, b]),
        _rows("x", x),
        "" if fits else f"b {list(b.shape)} does not fit x {list(x.shape)}",
        "" if b.is_contiguous() else "b is not contiguous",
    )


def lowrank_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> str:  # fmt: skip
    """See `stepgraph.ops.lowrank_delta`."""
    given = [tensor for tensor in (scale, shift, gate, residual) if tensor is not None]
    # The reference says what is missing.
    if (scale is None) != (shift is None) or (gate is None) != (residual is None):
        return "only one of scale and shift, or of gate and residual, is given"
    if not (0 < len(y) == len(a) <= MAX_VALUES):
        return f"{len(y)} stored outputs for {len(a)} maps; there are kernels for 1 to {MAX_VALUES}"
    return _first(
        _device([x, *y, p, *a, b, *given]),
        lowrank_input(x, b),
        _dtypes([x, *y, *a, *given]),
        _maps(x, y, p, a, b),
        "" if scale is None or shift is None else _first(*(_modulation("scale", m, x) for m in (scale, shift)), _width(x)),
        "" if gate is None or residual is None else _epilogue(y, gate, residual),
    )


def _maps(x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor) -> str:
    """Whether factors and stored values fit each other."""
    if any(factor.ndim != 2 or factor.shape[1] == 0 for factor in a) or sum(factor.shape[1] for factor in a) != b.shape[0]:
        return f"the ranks of a {[list(factor.shape) for factor in a]} do not add up to the rows of b {list(b.shape)}"
    if p.dtype != torch.float32 or p.shape != (*x.shape[:-1], b.shape[0]):
        return f"p is {p.dtype} {list(p.shape)}, not float32 {[*x.shape[:-1], b.shape[0]]}"
    if not all(tensor.is_contiguous() for tensor in (p, *a)):
        return "p or a factor is not contiguous"
    if any(stored.shape != (*x.shape[:-1], factor.shape[0]) for stored, factor in zip(y, a)):
        return f"the stored outputs {[list(stored.shape) for stored in y]} do not fit x {list(x.shape)} and a"
    return _first(*(_rows("a stored output", stored) for stored in y))


def _epilogue(y: list[Tensor], gate: Tensor, residual: Tensor) -> str:
    """Whether the gate and the residual fit the one map."""
    if len(y) != 1 or residual.shape != y[0].shape:
        return f"a gate needs one map and a residual of its shape, not {len(y)} and {list(residual.shape)}"
    return _first(_rows("residual", residual), _modulation("gate", gate, residual))


def _width(x: Tensor) -> str:
    return "" if x.shape[-1] <= MAX_CHANNELS else f"{x.shape[-1]} channels are more than {MAX_CHANNELS}"


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> str:
    """See `stepgraph.ops.modulated_norm`."""
    given = [x, scale, shift]
    return _first(
        _device(given), _dtypes(given), _rows("x", x), _modulation("scale", scale, x), _modulation("shift", shift, x), _width(x)
    )


def gated_residual(x: Tensor, gates: list[Tensor], values: list[Tensor]) -> str:
    """See `stepgraph.ops.gated_residual`."""
    given = [x, *gates, *values]
    if not (0 < len(gates) == len(values)):
        return f"{len(gates)} gates for {len(values)} values"
    if any(value.shape != x.shape for value in values):
        return "a value is not of x's shape"
    modulations = [_modulation("gate", gate, x) for gate in gates]
    return _first(_device(given), _dtypes(given), _rows("x", x), *(_rows("a value", v) for v in values), *modulations)


def linear_combination(values: list[Tensor], coefficients: Tensor) -> str:
    """See `stepgraph.ops.linear_combination`."""
    if not 0 < len(values) <= MAX_VALUES:
        return f"{len(values)} values; there are kernels for 1 to {MAX_VALUES}"
    first, count = values[0], coefficients.shape[0] if coefficients.ndim else 0
    if any(value.shape != first.shape for value in values):
        return "the values' shapes differ"
    if coefficients.dtype != torch.float32:
        return f"the coefficients are {coefficients.dtype}, not float32"
    if count not in (len(values), len(values) + 1) or coefficients.shape[1:] not in ((), (first.shape[-1],)):
        return f"coefficients {list(coefficients.shape)} do not fit {len(values)} values of {list(first.shape)}"
    return _first(
        _device([*values, coefficients]),
        _dtypes(values),
        *(_rows("a value", value) for value in values),
        "" if coefficients.is_contiguous() else "the coefficients are not contiguous",
    )
