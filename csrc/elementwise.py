"""The C++ providers of `modulated_norm`, `gated_residual` and `linear_combination`: one pass over memory each."""

import torch
from torch import Tensor

from stepgraph.csrc.library import kernels
from stepgraph.csrc.limits import declines_machine, declines_size
from stepgraph.csrc.places import common, declines_modulations, declines_tensors, modulation_of, rows_of, words


def run_modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """See `ops.modulated_norm`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        arguments = words(*common(x), *rows_of(out), *rows_of(x), *modulation_of(scale, x), *modulation_of(shift, x))
        kernels().stepgraph_modulated_norm(arguments, eps)
    return out


def declines_modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> str:
    """Why the C++ kernel does not normalise these."""
    return (
        declines_machine() or declines_tensors(x) or declines_modulations(x, scale, shift) or declines_size("modulated_norm", x)
    )


def run_gated_residual(x: Tensor, gates: list[Tensor], values: list[Tensor], out: Tensor | None = None) -> Tensor:
    """See `ops.gated_residual`; written to `out`, if given."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if out.numel():
        terms: list[int] = []
        for gate, value in zip(gates, values, strict=True):
            terms += (*modulation_of(gate, x), *rows_of(value))
        arguments = words(*common(x), *rows_of(out), *rows_of(x), len(gates), *terms)
        kernels().stepgraph_gated_residual(arguments)
    return out


def declines_gated_residual(x: Tensor, gates: list[Tensor], values: list[Tensor]) -> str:
    """Why the C++ kernel does not add these."""
    return (
        declines_machine() or declines_tensors(x) or declines_modulations(x, *gates)
        or declines_size("gated_residual", x, len(values))
    )  # fmt: skip


def run_linear_combination(values: list[Tensor], coefficients: Tensor) -> Tensor:
    """See `ops.linear_combination`."""
    first = values[0]
    out = torch.empty_like(first, memory_format=torch.contiguous_format)
    if out.numel():
        places = [word for value in values for word in rows_of(value)]
        arguments = words(
            *common(first), *rows_of(out), coefficients.data_ptr(), coefficients.stride(0), coefficients.ndim == 2,
            len(coefficients) > len(values), len(values), *places,
        )  # fmt: skip
        kernels().stepgraph_linear_combination(arguments)
    return out


def declines_linear_combination(values: list[Tensor], coefficients: Tensor) -> str:
    """Why the C++ kernel does not combine these."""
    if reason := declines_machine() or declines_tensors(values[0]):
        return reason
    if not coefficients.is_contiguous():
        return f"coefficients with strides {coefficients.stride()}; takes contiguous ones"
    return declines_size("linear_combination", values[0], len(values))
