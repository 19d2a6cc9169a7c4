"""A traced model whose module sites are mixtures of stored and fresh values."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stepgraph.compiler.interfaces.pass_context import PassContext, slot_name
from stepgraph.compiler.marking.graphs import written_storages
from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.compiler.marking.watched_graph import watched_graph
from stepgraph.compiler.passes.sites.soften_site import beta_name, soften_site
from stepgraph.errors import CompileError
from stepgraph.plan import COMPUTE, MODULE_KINDS
from stepgraph.plan.liveness import VALUE, Read


class MixedModel:
    """Two graphs on one model's weights: `fill` computes everything and `mix` interpolates every module site.

    Attributes:
        sites: The module sites, in graph order.
    """

    def __init__(self, model: nn.Module, marked: MarkedGraph) -> None:
        self._inputs = tuple(marked.trace.inputs)
        self._modules = tuple(i for i, site in enumerate(marked.sites) if site.kind in MODULE_KINDS)
        if not self._modules:
            raise CompileError(f"{type(model).__name__} has no module site; there is nothing to route")
        self.sites = tuple(marked.sites[i] for i in self._modules)
        self._fill = watched_graph(marked, model, self._modules)
        reads = tuple(Read(i, VALUE, 1) for i in self._modules)
        context = PassContext(marked.sites, COMPUTE * len(marked.sites), reads, (), written_storages(marked.graph))
        # What a later step reads is the mixture.
        self._mix = watched_graph(marked, model, self._modules, prepare=lambda gm: soften_site(gm, context))

    def fill(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute everything: the model's output [B, ...] and the value of every module site, pre-gate."""
        output, *values = self._fill(**self._tensors(inputs))
        return output, values

    def mix(
        self, inputs: Mapping[str, Any], stored: Sequence[torch.Tensor], beta: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Interpolate: the model's output and the mixture at every module site.

        Args:
            inputs: The forward's arguments.
            stored: One value per site.
            beta: [B, sites], 0 reuses and 1 computes.
        """
        extra = {}
        for column, (site, value) in enumerate(zip(self.sites, stored, strict=True)):
            extra[slot_name(site)] = value
            extra[beta_name(site)] = beta[:, column].to(value.dtype).reshape(-1, *(1,) * (value.ndim - 1))
        output, *values = self._mix(**self._tensors(inputs), **extra)
        return output, values

    def _tensors(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {name: inputs[name] for name in self._inputs}
