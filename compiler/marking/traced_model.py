"""A model with the graphs that were made of it: each is traced once, for whoever in a chain of calls needs it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from stepgraph.compiler.interfaces.family import Family
from stepgraph.compiler.marking.describe import input_shapes, inputs_for, latents_first, unbatched_of
from stepgraph.compiler.marking.find_sites import find_sites
from stepgraph.compiler.marking.mark_sites import MarkedGraph, mark_sites
from stepgraph.compiler.models import family_of
from stepgraph.compiler.tracing.table_rows import table_rows
from stepgraph.compiler.tracing.trace import trace
from stepgraph.runtime.program.program import signature
from stepgraph.runtime.session.row_numbers import RowNumbers


class TracedModel:
    """A model's family and its marked graphs, by the inputs' signature.

    It belongs to one chain of calls, such as one `accelerate`, and is dropped with it: a graph has whatever the forward read of
    the model baked in (a LoRA's strength, say), so that nothing of it is shared between models or kept for later.

    Attributes:
        model: As it is traced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._family = family_of(model)
        self._found = self._family.found
        self._graphs: dict[tuple[Any, ...], MarkedGraph] = {}

    @property
    def family(self) -> Family:
        """The model's adapter; where none covers its class, what was found in its last trace."""
        return self._family

    def example_inputs(self, batch: int = 1, conditioning: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `stepgraph.example_inputs`, which says what it raises."""
        return inputs_for(self.model, self.family, batch, conditioning)

    def ordered(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The forward's arguments with the latents first, as an adapter has them and callers may not."""
        return latents_first(self.model, inputs) if self._found else dict(inputs)

    def unbatched(self, inputs: Mapping[str, Any], planned: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
        """Names of the inputs without a batch dimension: the adapter's, or as a plan's shapes say."""
        return unbatched_of(inputs, planned) if self._found else self._family.unbatched

    @classmethod
    def of(cls, model: nn.Module, traced: "TracedModel | None") -> "TracedModel":
        """What was handed on, where it is of this very model; a new one otherwise."""
        return traced if traced is not None and traced.model is model else cls(model)

    def marked(self, inputs: Mapping[str, Any] | None = None) -> MarkedGraph:
        """The marked graph for inputs of a signature.

        Without inputs, one for the family's example inputs, of whatever batch size: its sites and all that a plan's header says
        are per sample.

        Raises:
            TraceError: The forward cannot be a static graph.
            CompileError: The model does not have the blocks that its family describes.
        """
        if inputs is not None and self._found:
            return self._marked_as_found(self.ordered(inputs))
        if inputs is None:
            inputs = self.example_inputs()
            shapes = input_shapes(inputs, self.family.unbatched)
            for known in self._graphs.values():
                if input_shapes(known.trace.inputs, self.family.unbatched) == shapes and known.trace.facts.matches(self.model):
                    return known
        key = signature(inputs)
        if not self._is_traced(key):
            self._graphs[key] = mark_sites(trace(self.model, inputs), self.family)
        return self._graphs[key]

    def _is_traced(self, key: tuple[Any, ...]) -> bool:
        return key in self._graphs and self._graphs[key].trace.facts.matches(self.model)

    def _marked_as_found(self, inputs: Mapping[str, Any]) -> MarkedGraph:
        """`marked`, of a model without an adapter: its family is what is found in the trace."""
        key = signature(inputs)
        if not self._is_traced(key):
            traced = trace(self.model, inputs)
            family = replace(family_of(self.model), unbatched=unbatched_of(inputs))
            self._graphs[key] = mark_sites(traced, find_sites(family, traced, self.model))
        self._family = self._graphs[key].family
        return self._graphs[key]

    def refuse_no_rows(self, conditioning: Mapping[str, Any]) -> None:
        """See that whole numbers among the conditioning, such as class labels, are rows of the tables that the forward has.

        Raises:
            ArgumentError: One is none.
        """
        known = next(iter(self._graphs.values()), None) or self.marked()
        rows = table_rows(known.trace.graph, self.model)
        numbers = RowNumbers()
        numbers.look(rows | {f"negative_{name}": count for name, count in rows.items()}, conditioning)
        numbers.finish()


def marked_graph(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> MarkedGraph:
    """Trace a model and mark its sites, for one use."""
    return TracedModel(model).marked(inputs)
