"""What of arguments that belong together (`stepgraph.op_shapes`) Triton kernels cannot do: devices, dtypes, sizes, strides.

Each function is called like its operation, with real or fake tensors, and returns the reason why its kernel does not take the
arguments; empty where it does.
"""

import importlib.util
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


def _device(x: Tensor) -> str:
    """Why kernels do not run where this tensor is."""
    if not _installed():
        return "triton is not installed"
    if x.device.type == "cpu":
        return "" if interpreting() else "the tensors are on the CPU, and triton's interpreter is off (TRITON_INTERPRET=1)"
    if x.device.type != "cuda":
        return f"the tensors are on {x.device.type!r}, not on a CUDA or HIP device"
    if interpreting():
        return "TRITON_INTERPRET is set: the interpreter is for tensors on the CPU"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = _capability(x.device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return ""


def _dtype(x: Tensor) -> str:
    if x.dtype not in DTYPES:
        return f"there is no kernel for {x.dtype}; expected one of {', '.join(map(str, DTYPES))}"
    wrong = x.device.type == "cpu" and x.dtype not in INTERPRETED
    return f"triton's interpreter computes wrongly with {x.dtype}" if wrong else ""


def _count(name: str, count: int) -> str:
    return "" if count <= MAX_VALUES else f"{count} {name}; there are kernels for 1 to {MAX_VALUES}"


def _width(x: Tensor) -> str:
    return "" if x.shape[-1] <= MAX_CHANNELS else f"{x.shape[-1]} channels are more than {MAX_CHANNELS}"


def _contiguous(**tensors: Tensor) -> str:
    strides = next((f"{name} has strides {x.stride()}" for name, x in tensors.items() if not x.is_contiguous()), "")
    return f"{strides}; expected to be contiguous" if strides else ""


def lowrank_input(x: Tensor, b: Tensor) -> str:
    """See `stepgraph.ops.lowrank_input`."""
    return _device(x) or _dtype(x) or _contiguous(b=b)


def lowrank_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> str:  # fmt: skip
    """See `stepgraph.ops.lowrank_delta`."""
    factors = {f"a[{i}]": map_a for i, map_a in enumerate(a)}
    return (
        _device(x) or _dtype(x) or _count("maps", len(a)) or _contiguous(b=b, p=p, **factors)
        or (_width(x) if scale is not None else "")
    )  # fmt: skip


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> str:
    """See `stepgraph.ops.modulated_norm`."""
    return _device(x) or _dtype(x) or _width(x)


def gated_residual(x: Tensor, gates: list[Tensor], values: list[Tensor]) -> str:
    """See `stepgraph.ops.gated_residual`."""
    return _device(x) or _dtype(x)


def linear_combination(values: list[Tensor], coefficients: Tensor) -> str:
    """See `stepgraph.ops.linear_combination`."""
    return _device(values[0]) or _dtype(values[0]) or _count("values", len(values)) or _contiguous(coefficients=coefficients)
