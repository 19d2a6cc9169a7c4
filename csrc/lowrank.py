"""The C++ providers of `lowrank_input` and `lowrank_delta`."""

import torch
from torch import Tensor

from stepgraph.csrc.elementwise import run_modulated_norm
from stepgraph.csrc.library import kernels
from stepgraph.csrc.limits import declines_correction, declines_machine, projects
from stepgraph.csrc.packed import PACKED
from stepgraph.csrc.places import (
    common,
    declines_modulation,
    declines_rows,
    declines_tensors,
    modulation_of,
    rows_of,
    words,
)
from stepgraph.ops import REFERENCE, forced, lowrank_input

NOWHERE = (0, 0, 0)


def run_lowrank_input(x: Tensor, b: Tensor) -> Tensor:
    """See `ops.lowrank_input`."""
    if not projects(x, b):
        return lowrank_input.providers[REFERENCE].run(x, b)  # type: ignore[no-any-return]
    p = torch.empty((*x.shape[:-1], b.shape[0]), dtype=torch.float32)
    if p.numel():
        packed = PACKED.get(b)
        arguments = words(
            *common(x), b.shape[0], False, False, 0, packed.data_ptr(),
            *rows_of(x), *(3 * NOWHERE), *rows_of(p), *(2 * NOWHERE),
        )  # fmt: skip
        kernels().stepgraph_lowrank(arguments, 0.0)
    return p


def declines_lowrank_input(x: Tensor, b: Tensor) -> str:
    """Why the C++ kernel does not project these."""
    return (
        declines_machine() or declines_tensors(x, b) or declines_rows(x) or _declines_weight(x, b)
        or ("" if projects(x, b) or forced() else "torch's matrix product is faster for these sizes")
    )  # fmt: skip


def run_lowrank_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """See `ops.lowrank_delta`."""
    out = [torch.empty_like(stored, memory_format=torch.contiguous_format) for stored in y]
    if p.numel() == 0:
        return out
    prologue = epilogue = 2 * NOWHERE
    if scale is not None and shift is not None:
        prologue = (*modulation_of(scale, x), *modulation_of(shift, x))
    if gate is not None and residual is not None:
        epilogue = (*modulation_of(gate, y[0]), *rows_of(residual))
    # What the kernel reads is held until it returns: another thread may drop a packed weight from the cache.
    held = [PACKED.get(map_a) for map_a in a]
    weight, projected = 0, NOWHERE
    if projects(x, b):
        held.append(PACKED.get(b))
        weight = held[-1].data_ptr()
    else:
        held.append(_projected(x, b, scale, shift, eps))
        projected = rows_of(held[-1])
    maps = [_map(*each) for each in zip(y, out, a, held, strict=False)]
    arguments = words(
        *common(x), b.shape[0], bool(prologue[0]), bool(epilogue[0]), len(a), weight,
        *rows_of(x), *prologue, *projected, *rows_of(p), *epilogue, *(word for own in maps for word in own),
    )  # fmt: skip
    kernels().stepgraph_lowrank(arguments, eps)
    return out


def _projected(x: Tensor, b: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    """B x by torch, as `lowrank_input` computed p where the kernels left it to torch, so that the two cancel."""
    if scale is not None and shift is not None:
        x = run_modulated_norm(x, scale, shift, eps)
    return lowrank_input.providers[REFERENCE].run(x, b)  # type: ignore[no-any-return]


def _map(stored: Tensor, new: Tensor, a: Tensor, packed: Tensor) -> tuple[int, ...]:
    """`Map` of lowrank_delta.cpp."""
    return (*a.shape, packed.data_ptr(), *rows_of(stored), *rows_of(new))


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
    normalised, gated = False, False
    if scale is not None and shift is not None:
        normalised = True
        if reason := declines_modulation(scale, x) or declines_modulation(shift, x):
            return reason
    if gate is not None and residual is not None:
        gated = True
        if len(y) != 1 or residual.shape != y[0].shape:
            return f"{len(y)} maps with a residual {list(residual.shape)}"
        if reason := declines_modulation(gate, y[0]) or declines_rows(residual):
            return reason
    return declines_correction(x, b, normalised or gated)
