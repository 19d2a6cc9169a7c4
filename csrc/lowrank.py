"""The C++ providers of `lowrank_input` and `lowrank_delta`."""

import torch
from torch import Tensor

from stepgraph.csrc.elementwise import run_modulated_norm
from stepgraph.csrc.library import kernels
from stepgraph.csrc.limits import declines_correction, declines_machine, projects
from stepgraph.csrc.packed import PACKED
from stepgraph.csrc.places import common, declines_modulations, declines_tensors, modulation_of, rows_of, words
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
        declines_machine() or declines_tensors(x) or _declines_one_row(x)
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
        *rows_of(x), *prologue, *projected, *rows_of(p), *epilogue, *(word for places in maps for word in places),
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
    reason = declines_machine() or declines_tensors(x) or _declines_one_row(x)
    if scale is not None and shift is not None:
        reason = reason or declines_modulations(x, scale, shift)
    if gate is not None:
        reason = reason or declines_modulations(y[0], gate)
    return reason or declines_correction(x, b, ends=scale is not None or gate is not None)


def _declines_one_row(x: Tensor) -> str:
    return "" if x.ndim > 1 else f"x is {list(x.shape)}; takes at least two dimensions"
