"""Turn a specialised graph into the callable that runs it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from stepgraph.config import CompileConfig


def lower(gm: fx.GraphModule, config: CompileConfig) -> Callable[..., Any]:
    """The graph as a callable (*inputs, *slots) -> flat tuple of tensors.

    "eager" is the graph's own generated Python. "inductor" compiles the whole graph with torch.compile, for static shapes;
    it is called once here, so that compilation happens now and not in the first run.
    """
    if config.backend == "eager":
        return gm
    compiled = Compiled(gm)
    placeholders = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        compiled.call(*(torch.zeros(val.shape, dtype=val.dtype, device=val.device) for val in placeholders))
    return compiled


class Compiled:
    """A graph compiled by inductor. Compiling again in a later call, which takes seconds to minutes, is an error."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.call = torch.compile(gm, backend="inductor", fullgraph=True, dynamic=False)

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Run it. Strides are part of what was compiled, so that every argument is made contiguous first."""
        with torch.compiler.set_stance("fail_on_recompile"):
            return self.call(*(tensor.contiguous() for tensor in tensors))
