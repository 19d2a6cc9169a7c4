"""Is a traced graph the whole truth? Not where a second trace does something else than the first."""

from collections.abc import Mapping

import torch
from torch import fx

from stepgraph.compiler.tracing.tracer import NO_PAST
from stepgraph.errors import TraceError


def refuse_other_operations(
    first: fx.Graph, second: fx.Graph, constants: Mapping[str, torch.Tensor], again: Mapping[str, torch.Tensor]
) -> None:
    """Two traces of one forward do the same on the same constants, unless it depends on something outside itself."""
    for name, value in constants.items():
        if name in again and value is not again[name] and not torch.equal(value, again[name]):
            raise TraceError(f"traced twice, the forward came with other values of a {list(value.shape)} constant; {NO_PAST}")
    for one, other in zip(first.nodes, second.nodes, strict=False):
        if _spelled(one) != _spelled(other):
            source = (other.stack_trace or "").strip().removeprefix('File "').replace('", line ', ":").replace("\n", " ")
            raise TraceError(
                f"{source or other.format_node()}: traced twice, the forward did {_spelled(one)} and then {_spelled(other)}; "
                f"it depends on something that is neither an input nor a weight, such as a counter or a clock"
            )
    if len(first.nodes) != len(second.nodes):
        raise TraceError(
            f"traced twice, the forward took {len(first.nodes)} and then {len(second.nodes)} operations; {NO_PAST}"
        )


def _spelled(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))
    return f"{target}{node.args}{dict(node.kwargs)}"
