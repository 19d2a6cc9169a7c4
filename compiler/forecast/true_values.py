"""The sites' values in one evaluation of the whole model."""

from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.compiler.passes.erase_markers import erase_markers
from stepgraph.compiler.passes.store_site import store_site
from stepgraph.compiler.tracing.graphs import written_storages
from stepgraph.compiler.tracing.mark_sites import MarkedGraph
from stepgraph.plan import COMPUTE
from stepgraph.plan.liveness import VALUE


class TrueValues:
    """Called with the model's inputs, it runs all of the model and returns its output and the values of some sites.

    Attributes:
        channels: Size of the last dimension of each site's value.
    """

    def __init__(self, marked: MarkedGraph, model: nn.Module, indices: Sequence[int]) -> None:
        stores = tuple((i, VALUE) for i in indices)
        context = PassContext(marked.sites, COMPUTE * len(marked.sites), (), stores, written_storages(marked.graph))
        graph = fx.Graph()
        graph.output(graph.graph_copy(marked.graph, {}))
        self._graph = marked.trace.bind(model, graph)
        values = {node.meta["marker"]: node.meta["val"] for node in self._graph.graph.nodes if "marker" in node.meta}
        self.channels = {i: int(values[i].shape[-1]) for i in indices}
        self._indices, self._names = tuple(indices), tuple(marked.trace.inputs)
        self._results = marked.trace.output_spec.num_leaves
        store_site(self._graph, context)
        erase_markers(self._graph, context)
        self._graph.recompile()

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The model's (first) output, and site index -> value."""
        outputs = self._graph(*(inputs[name] for name in self._names))
        return outputs[0], dict(zip(self._indices, outputs[self._results :], strict=True))
