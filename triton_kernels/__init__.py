"""Triton providers of the fused operations, for GPUs: one file per operation (kernel, launcher); those share
`tiles.py` and `projection.py` and do not import each other.

Importing this package registers them on `stepgraph.ops` and does not import Triton: the file of an operation is imported when
the operation first runs, and `declines.py` answers for which arguments a kernel is there without it.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

from stepgraph.ops import OPS
from stepgraph.triton_kernels import declines

PROVIDER = "triton"
DECLINES: dict[str, Callable[..., str]] = {
    "lowrank_input": declines.lowrank_input,
    "lowrank_delta": declines.lowrank_delta,
    "modulated_norm": declines.modulated_norm,
    "gated_residual": declines.gated_residual,
    "linear_combination": declines.linear_combination,
}
# Whose launchers take the memory for their result.
INTO = frozenset({"gated_residual"})


def _launcher(name: str) -> Callable[..., Any]:
    """The launcher of that name, out of the file of that name, imported at the first call."""

    @cache
    def launcher() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(f"stepgraph.triton_kernels.{name}"), name)
        return found

    return lambda *args, **kwargs: launcher()(*args, **kwargs)


for _name, _declines in DECLINES.items():
    OPS[_name].register(PROVIDER, _launcher(_name), _declines, into=_name in INTO, tuned=True)
