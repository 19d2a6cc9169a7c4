"""The C++ providers of `lowrank_input` and `lowrank_delta`."""

import torch
from torch import Tensor

from stepgraph.csrc.elementwise import run_modulated_norm
from stepgraph.csrc.limits import corrects, declines_machine, projects
from stepgraph.csrc.native import native
from stepgraph.csrc.packed import PACKED
from stepgraph.csrc.places import (
    Place, common, declines_modulation, declines_rows, declines_tensors, modulation_of, rows_of, words,
)  # fmt: skip
from stepgraph.ops import lowrank_input

NOWHERE: Place = (0, 0, 0)


def run_lowrank_input(x: Tensor, b: Tensor) -> Tensor:
    """See `ops.lowrank_input`."""
    p = torch.empty((*x.shape[:-1], b.shape[0]), dtype=torch.float32)
    if p.numel():
        packed = PACKED.get(b)
        arguments = words(
            *common(x), b.shape[0], False, False, 0, packed.data_ptr(),
            *rows_of(x), *NOWHERE, *NOWHERE, *NOWHERE, *rows_of(p), *NOWHERE, *NOWHERE,
        )  # fmt: skip
        native().library.stepgraph_lowrank(arguments, 0.0)
    return p


def declines_lowrank_input(x: Tensor, b: Tensor) -> str:
    """Why the C++ kernel does not project these."""
    return (
        declines_machine() or declines_tensors(x, b) or declines_rows(x) or _declines_weight(x, b)
        or ("" if projects(x, b) else "torch's matrix product is faster for these sizes")
    )  # fmt: skip


def run_lowrank_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """See `ops.lowrank_delta`."""
    out = [torch.empty_like(stored, memory_format=torch.contiguous_format) for stored in y]
    if p.numel() == 0:
        return out
    normalised, projected, weight = scale is not None and shift is not None, NOWHERE, 0
    # Tensors that the kernel reads are held until it returns: another thread may drop a packed weight from the cache.
    if projects(x, b):
        held = [PACKED.get(b)]
        weight = held[0].data_ptr()
    else:
        # The same projection as the reference's p comes from, so that the two cancel.
        held = [lowrank_input.reference(run_modulated_norm(x, scale, shift, eps) if normalised else x, b)]
        projected = rows_of(held[0])
    maps: list[int] = []
    for stored, new, map_a in zip(y, out, a, strict=True):
        held.append(PACKED.get(map_a))
        maps += (*map_a.shape, held[-1].data_ptr(), *rows_of(stored), *rows_of(new))
    gated = gate is not None and residual is not None
    arguments = words(
        *common(x), b.shape[0], normalised, gated, len(a), weight, *rows_of(x),
        *(modulation_of(scale, x) if normalised else NOWHERE), *(modulation_of(shift, x) if normalised else NOWHERE), *projected,
        *rows_of(p), *(modulation_of(gate, y[0]) if gated else NOWHERE), *(rows_of(residual) if gated else NOWHERE), *maps,
    )  # fmt: skip
    native().library.stepgraph_lowrank(arguments, eps)
    return out


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
    if not corrects(x, b, normalised or gated):
        return "torch's matrix products are faster for these sizes"
    return ""
