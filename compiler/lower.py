"""Turn a specialised graph into the callable that runs it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from stepgraph.config import CompileConfig, CompileError


def lower(gm: fx.GraphModule, config: CompileConfig) -> Callable[..., Any]:
    """The graph as a callable (*inputs, *slots) -> flat tuple of tensors.

    "eager" is the graph's own generated Python. "inductor" compiles the whole graph with torch.compile, for static shapes;
    it is called once here, so that compilation happens now and not in the first run.
    """
    if config.backend == "eager":
        return gm
    placeholders = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    compiled = Compiled(gm, [tuple(value.shape) for value in placeholders])
    with torch.no_grad():
        compiled.call(*(torch.zeros(val.shape, dtype=val.dtype, device=val.device) for val in placeholders))
    return compiled


def no_guards(guards: Sequence[Any]) -> list[bool]:
    """Which of dynamo's guards to keep: none.

    Shapes, dtypes and devices are part of a program's signature, strides are made equal, weights are the model's; what else
    dynamo watches (thread counts, precision settings, inference mode) does not make the compiled code wrong.
    """
    return [False] * len(guards)


class Compiled:
    """A graph compiled by inductor, once. Compiling again in a later call, which takes seconds to minutes, is an error."""

    def __init__(self, gm: fx.GraphModule, shapes: list[tuple[int, ...]]) -> None:
        self.call = torch.compile(gm, backend="inductor", fullgraph=True, dynamic=False, options={"guard_filter_fn": no_guards})
        self.shapes = shapes

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Run it. Strides are part of what was compiled, so that every argument is made contiguous first."""
        given = [tuple(tensor.shape) for tensor in tensors]
        if given != self.shapes:
            raise CompileError(f"compiled for arguments of the shapes {self.shapes}; given are {given}")
        with torch.compiler.set_stance("fail_on_recompile"):
            return self.call(*(tensor.contiguous() for tensor in tensors))
