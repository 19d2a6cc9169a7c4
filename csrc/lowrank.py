"""The C++ providers of `lowrank_input` and `lowrank_delta`."""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from stepgraph.csrc.elementwise import run_gated_residual, run_modulated_norm
from stepgraph.csrc.limits import declines_machine, multiplies
from stepgraph.csrc.native import native
from stepgraph.csrc.packed import PACKED
from stepgraph.csrc.places import (
    Place, common, declines_modulation, declines_rows, declines_tensors, modulation_of, rows_of,
)  # fmt: skip

NOWHERE: Place = (0, 0, 0)


def run_lowrank_input(x: Tensor, b: Tensor) -> Tensor:
    """See `ops.lowrank_input`."""
    p = torch.empty((*x.shape[:-1], b.shape[0]), dtype=torch.float32)
    if p.numel():
        _call(x, b, p, [], NOWHERE, NOWHERE, 0.0, NOWHERE, NOWHERE)
    return p


def declines_lowrank_input(x: Tensor, b: Tensor) -> str:
    """Why the C++ kernel does not project these."""
    return (
        declines_machine() or declines_tensors(x, b) or declines_rows(x) or _declines_weight(x, b)
        or ("" if multiplies(x, b) else "torch's matrix product is faster for these sizes")
    )  # fmt: skip


def run_lowrank_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """See `ops.lowrank_delta`."""
    if not multiplies(x, b):
        return _around_matmul(x, y, p, a, b, scale, shift, eps, gate, residual)
    out = [torch.empty_like(stored, memory_format=torch.contiguous_format) for stored in y]
    if x.numel() == 0:
        return out
    # Held until the call is over: another thread may drop them from the cache.
    packed = [PACKED.get(map_a) for map_a in a]
    maps: list[int] = []
    for stored, new, map_a, weight in zip(y, out, a, packed, strict=True):
        maps += (*map_a.shape, weight.data_ptr(), *rows_of(stored), *rows_of(new))
    normalised = scale is not None and shift is not None
    gated = gate is not None and residual is not None
    _call(
        x, b, p, maps,
        modulation_of(scale, x) if normalised else NOWHERE, modulation_of(shift, x) if normalised else NOWHERE, eps,
        modulation_of(gate, y[0]) if gated else NOWHERE, rows_of(residual) if gated else NOWHERE,
    )  # fmt: skip
    return out


def _call(
    x: Tensor, b: Tensor, p: Tensor, maps: list[int], scale: Place, shift: Place, eps: float, gate: Place, residual: Place
) -> None:
    """Run the kernel on `Lowrank` of lowrank_delta.cpp, with the words of its maps behind it."""
    weight = PACKED.get(b)
    words = [
        *common(x), b.shape[0], scale is not NOWHERE, gate is not NOWHERE, len(maps) // 9, weight.data_ptr(),
        *rows_of(x), *scale, *shift, *rows_of(p), *gate, *residual, *maps,
    ]  # fmt: skip
    native().library.stepgraph_lowrank((ctypes.c_int64 * len(words))(*words), eps)


def _around_matmul(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float,
    gate: Tensor | None, residual: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The prologue and the epilogue fused, around torch's matrix products: the same as the reference's, so p cancels."""
    if scale is not None and shift is not None:
        x = run_modulated_norm(x, scale, shift, eps)
    t = F.linear(x, b).sub_(p)
    parts = t.split([map_a.shape[1] for map_a in a], dim=-1)
    found = []
    for stored, part, map_a in zip(y, parts, a, strict=True):
        rows = torch.addmm(stored.reshape(-1, stored.shape[-1]), part.reshape(-1, part.shape[-1]), map_a.t())
        found.append(rows.view(stored.shape))
    if gate is not None and residual is not None:
        found = [run_gated_residual(residual, [gate], found)]
    return found


def declines_lowrank_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> str:  # fmt: skip
    """Why the C++ kernel does not correct these."""
    given = [tensor for tensor in (scale, shift, gate, residual) if tensor is not None]
    reason = declines_machine() or declines_tensors(x, *y, *a, b, *given) or declines_rows(x, *y, p) or _declines_weight(x, b)
    return reason or _declines_maps(x, y, p, a, b) or _declines_ends(x, y, b, scale, shift, gate, residual)


def _declines_weight(x: Tensor, b: Tensor) -> str:
    if x.ndim < 2 or b.ndim != 2 or b.shape[1] != x.shape[-1] or 0 in b.shape:
        return f"B {list(b.shape)} for x {list(x.shape)}"
    return ""


def _declines_maps(x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor) -> str:
    if p.dtype != torch.float32 or p.device.type != "cpu" or p.shape != (*x.shape[:-1], b.shape[0]):
        return f"p {list(p.shape)} of {p.dtype} for x {list(x.shape)} and B {list(b.shape)}"
    if not y or len(y) != len(a) or any(map_a.ndim != 2 or 0 in map_a.shape for map_a in a):
        return f"{len(y)} outputs for {len(a)} maps"
    if sum(map_a.shape[1] for map_a in a) != b.shape[0]:
        return f"ranks {[map_a.shape[1] for map_a in a]} for B {list(b.shape)}"
    for stored, map_a in zip(y, a, strict=True):
        if stored.shape != (*x.shape[:-1], map_a.shape[0]):
            return f"y {list(stored.shape)} for x {list(x.shape)} and A {list(map_a.shape)}"
    return ""


def _declines_ends(
    x: Tensor,
    y: list[Tensor],
    b: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> str:
    """Of the prologue and the epilogue, and of the sizes, which depend on whether there are these."""
    normalised, gated = scale is not None and shift is not None, gate is not None and residual is not None
    if normalised and (reason := declines_modulation(scale, x) or declines_modulation(shift, x)):
        return reason
    if gated and len(y) != 1:
        return f"a gate for {len(y)} maps"
    if gated and residual.shape != y[0].shape:
        return f"residual {list(residual.shape)} for y {list(y[0].shape)}"
    if gated and (reason := declines_modulation(gate, y[0]) or declines_rows(residual)):
        return reason
    if not multiplies(x, b) and not (normalised or gated):
        return "torch's matrix products are faster for these sizes"
    return ""
