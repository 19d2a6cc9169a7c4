"""Graphs whose weights are arguments, so that programs on disk hold none and share one file of them."""

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from stepgraph.node_facts import PROVIDER, op_of, output_of
from stepgraph.ops import OPS
from stepgraph.runtime.export.weight_names import WeightNames
from stepgraph.runtime.program.packed_linear import linear_maps, merged_linear


class WeightlessGraph(nn.Module):
    """A graph as a module without weights: (*inputs, *weights) -> flat tuple of tensors.

    Args:
        gm: The graph; it is copied, and its modules are shared with nobody, so that sessions may go on running.
        names: Notes the graph's weights.
        portable: Fused operations as their references, which are plain torch; else by the providers that were chosen.
    """

    def __init__(self, gm: fx.GraphModule, names: WeightNames, portable: bool = True) -> None:
        super().__init__()
        graph, attributes = fx.Graph(), dict[str, Any]()
        weights: dict[str, Tensor] = {}
        copies: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.nodes:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if portable and PROVIDER in node.meta:
                copies[node].target = OPS[op_of(node)].reference
            elif portable and node.target is merged_linear:
                copies[node].target = linear_maps
            if node.op in ("call_module", "get_attr") and str(node.target) not in attributes:
                attributes[str(node.target)], tensors = _emptied(operator.attrgetter(str(node.target))(gm), str(node.target))
                weights |= tensors
        # By their paths in the graph.
        self.paths = {path: names.name(tensor) for path, tensor in weights.items()}
        self.weights = tuple(dict.fromkeys(self.paths.values()))
        # In a tuple: as a submodule it would hand torch.export its empty weights.
        self._held = (fx.GraphModule(attributes, graph, class_name=type(gm).__name__),)

    def examples(self) -> list[Tensor]:
        """Zeros like the inputs of a variant's graph, contiguous."""
        placeholders = self._held[0].graph.find_nodes(op="placeholder")
        return [torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype, device=n.meta["val"].device) for n in placeholders]

    def results(self) -> list[Tensor]:
        """The results without data."""
        output = output_of(self._held[0].graph)
        return [node.meta["val"] for node in output.args[0]]

    def forward(self, *tensors: Tensor) -> Any:
        """The graph's results."""
        count = len(tensors) - len(self.weights)
        by_name = dict(zip(self.weights, tensors[count:], strict=True))
        return functional_call(self._held[0], {path: by_name[name] for path, name in self.paths.items()}, tensors[:count])


def _emptied(value: Any, path: str) -> tuple[Any, dict[str, Tensor]]:
    """A module or tensor without memory, and its tensors by their path."""
    if isinstance(value, Tensor):
        return _empty(value), {path: value}
    tensors = dict(value.named_parameters(remove_duplicate=False)) | dict(value.named_buffers(remove_duplicate=False))
    emptied = copy.deepcopy(value, {id(tensor): _empty(tensor) for tensor in tensors.values()})
    return emptied, {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
