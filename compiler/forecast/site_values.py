"""The sites' values in one evaluation of the whole model."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.compiler.marking.watched_graph import watched_graph
from stepgraph.node_facts import MARKER


class SiteValues:
    """Called with the model's inputs, it runs all of the model and returns its output and the values of some sites.

    Attributes:
        channels: Size of the last dimension of each site's value.
    """

    def __init__(self, marked: MarkedGraph, model: nn.Module, indices: Sequence[int]) -> None:
        values = {node.meta[MARKER]: node.meta["val"] for node in marked.graph.nodes if MARKER in node.meta}
        self.channels = {i: int(values[i].shape[-1]) for i in indices}
        self._indices, self._names = tuple(indices), tuple(marked.trace.inputs)
        self._results = marked.trace.output_spec.num_leaves
        self._graph = watched_graph(marked, model, indices)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The model's (first) output, and site index -> value."""
        outputs = self._graph(*(inputs[name] for name in self._names))
        return outputs[0], dict(zip(self._indices, outputs[self._results :], strict=True))
