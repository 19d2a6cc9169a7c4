"""Put programs on other tensors of the same names, without tracing: their graphs and regions hold weights by reference."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import Tensor, fx
from torch.fx.graph_module import _assign_attr

from stepgraph.runtime.program.copy_graph import copy_nodes
from stepgraph.runtime.program.facts import Strength
from stepgraph.runtime.program.lazy_graph import lazy_graph, written_forward
from stepgraph.runtime.program.program import Program, Variant
from stepgraph.runtime.program.region_calls import GraphCall, RegionCalls, VariantCall
from stepgraph.runtime.program.tables import Hoisted


def rebind(program: Program, replaced: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Let a program use new tensors in the place of old ones, of the same shapes, dtypes, devices and strides; in place."""
    news = {id(then): now for then, now in replaced}
    for gm in _graphs(program):
        for path in {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}:
            # What lies in a module of the model itself is the new one already.
            new = news.get(id(attrgetter(path)(gm)))
            if new is not None:
                parent, _, name = path.rpartition(".")
                delattr(gm.get_submodule(parent), name)
                _assign_attr(new, gm, path)
    for variant in program.variants:
        if isinstance(variant.run, RegionCalls):
            variant.run.weights[:] = [news.get(id(weight), weight) for weight in variant.run.weights]


def rebound(program: Program, news: Mapping[int, Any]) -> Program:
    """A copy of a program on another model's modules and tensors; graphs are copied, what was compiled is shared.

    Args:
        program: Stays as it is.
        news: By the id of a module or tensor of its model, the one of the same name in the other.
    """
    # Each model has strengths of its own.
    strengths = tuple(
        replace(strength, constants=tuple(constant.clone() for constant in strength.constants))
        for strength in program.facts.strengths
    )
    news = {**news, **_constants(program.facts.strengths, strengths)}
    copies = {id(gm): _on_others(gm, news) for gm in _graphs(program)}
    return replace(
        program,
        facts=replace(program.facts, strengths=strengths),
        variants=tuple(_variant(variant, copies[id(variant.graph)], news) for variant in program.variants),
        hoisted=None if program.hoisted is None else _hoisted(program.hoisted, copies),
    )


def _constants(before: Sequence[Strength], now: Sequence[Strength]) -> dict[int, Tensor]:
    """By the id of what a graph reads in a strength's place, what it reads of the other model's."""
    return {
        id(then): constant
        for strength, other in zip(before, now, strict=True)
        for then, constant in zip(strength.constants, other.constants, strict=True)
    }


def can_rebind(program: Program) -> bool:
    """Whether a program can be put on another model: graphs that were compiled whole hold their own."""
    return all(isinstance(variant.run, RegionCalls) or _is_graph(variant.run) for variant in program.variants)


def _is_graph(run: VariantCall) -> bool:
    return isinstance(run, GraphCall) and isinstance(getattr(run.forward, "__self__", None), fx.GraphModule)


def _graphs(program: Program) -> Iterator[fx.GraphModule]:
    for variant in program.variants:
        yield variant.graph
    if program.hoisted is not None:
        for call in (program.hoisted.prompt, program.hoisted.timestep):
            yield call.__self__  # type: ignore[attr-defined]


def _on_others(gm: fx.GraphModule, news: Mapping[int, Any]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(copy_nodes(gm.graph, graph, {}))
    attributes = {}
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module") and str(node.target) not in attributes:
            value = attrgetter(str(node.target))(gm)
            attributes[str(node.target)] = news.get(id(value), value)
    return lazy_graph(attributes, graph, type(gm).__name__)


def _variant(variant: Variant, graph: fx.GraphModule, news: Mapping[int, Any]) -> Variant:
    run = variant.run
    if isinstance(run, RegionCalls):
        run = replace(run, weights=[news.get(id(weight), weight) for weight in run.weights])
    elif isinstance(run, GraphCall):
        run = replace(run, forward=written_forward(graph))
    return replace(variant, run=run, graph=graph)


def _hoisted(hoisted: Hoisted, copies: Mapping[int, fx.GraphModule]) -> Hoisted:
    prompt, timestep = (written_forward(copies[id(call.__self__)]) for call in (hoisted.prompt, hoisted.timestep))  # type: ignore[attr-defined]
    return replace(hoisted, prompt=prompt, timestep=timestep)
