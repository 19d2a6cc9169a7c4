"""Turn a specialised graph into the callable that runs it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from stepgraph.config import CompileConfig


def lower(gm: fx.GraphModule, config: CompileConfig) -> Callable[..., Any]:
    """The graph as a callable (*inputs, *slots) -> flat tuple of tensors.

    "eager" is the graph's own generated Python. "inductor" compiles the whole graph with torch.compile, for static
    shapes; it is called once here, so that compilation happens now and not in the first run.
    """
    if config.backend == "eager":
        return gm
    compiled = torch.compile(gm, backend="inductor", fullgraph=True, dynamic=False)
    with torch.no_grad():
        compiled(*(_zeros_like(node.meta["val"]) for node in gm.graph.nodes if node.op == "placeholder"))
    return compiled


def _zeros_like(value: torch.Tensor) -> torch.Tensor:
    """Real zeros with a fake tensor's shape, strides, dtype and device."""
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device).zero_()
