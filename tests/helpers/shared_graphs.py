"""Tests hand the traces of their models on to each other, as the product does within one chain of calls.

Tracing is most of what a tiny model's compilation takes. A trace is handed on only while all that it could have read of the
model is what it was: every attribute of every module, plain values and what dicts and lists hold by value, all else by
identity. A model that was built anew gets the trace of one like it: of the same modules with the same attributes, and tensors
of the same shapes, which a graph has by name. What lies outside the model (a patched function of torch, say) is not seen but by
the facts of the trace: tests of such things are marked `traces`.
"""

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from stepgraph.compiler.interfaces.family import Family
from stepgraph.compiler.marking import traced_model
from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.compiler.tracing.trace import Trace
from stepgraph.runtime.program.program import signature

trace_anew, mark_anew = traced_model.trace, traced_model.mark_sites
# Beside each trace its key, which keeps the objects that it compares alive: a new object cannot take the place of an old one.
_known: "weakref.WeakKeyDictionary[torch.nn.Module, dict[Hashable, Trace]]" = weakref.WeakKeyDictionary()
# Traces of models by what these are like, the last ones.
_of_models_like: OrderedDict[Hashable, Trace] = OrderedDict()
# Marked graphs of traces that are handed on, each with its trace, whose place no other can take meanwhile, and its nodes.
_marked: OrderedDict[Hashable, tuple[Trace, MarkedGraph, Hashable]] = OrderedDict()
DEPTH, MOST = 4, 64
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Same:
    """An object, equal to itself alone."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def trace_once(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """In place of `trace` where marked graphs are made."""
    traces = _known.setdefault(model, {})
    around = (signature(inputs), tuple(inputs), torch.get_default_dtype())
    key = (*around, facts_of(model))
    if key not in traces:
        traces[key] = _of_one_like(model, inputs, (*around, facts_of(model, alike=True)))
    return traces[key]


def _of_one_like(model: torch.nn.Module, inputs: Mapping[str, Any], key: Hashable) -> Trace:
    """The trace of a model like this one, or its own."""
    known = _of_models_like.get(key)
    if known is not None and known.facts.matches(model):
        return known
    trace = trace_anew(model, inputs)
    # Tensors that a graph holds itself are those of its model.
    if not trace.tensors:
        _of_models_like[key] = trace
        if len(_of_models_like) > MOST:
            _of_models_like.popitem(last=False)
    return trace


def mark_once(trace: Trace, family: Family) -> MarkedGraph:
    """In place of `mark_sites` there: a marked graph is copied by who rewrites it, as its trace is."""
    # What is found anew in each trace has a family of its own.
    if family.found:
        return mark_anew(trace, family)
    key = (id(trace), Same(family))
    if key not in _marked:
        marked = mark_anew(trace, family)
        _marked[key] = trace, marked, _nodes_of(marked)
        if len(_marked) > MOST:
            _marked.popitem(last=False)
    _, marked, nodes = _marked[key]
    assert _nodes_of(marked) == nodes, "a marked graph was rewritten in place; let who rewrites it copy it"
    return marked


def _nodes_of(marked: MarkedGraph) -> Hashable:
    return tuple((node.name, node.target, len(node.users)) for node in marked.graph.nodes)


def facts_of(model: torch.nn.Module, alike: bool = False) -> Hashable:
    """Everything that a forward can read of its model; where others are to be `alike`, of tensors and modules their kind."""
    return tuple(
        (path, type(module), Same(type(module).forward), _by_value(vars(module), DEPTH, alike))
        for path, module in model.named_modules()
    )


def _by_value(value: Any, depth: int, alike: bool) -> Hashable:
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    # Most of what a module has: hooks and parameters that it has none of.
    if depth and (kind is dict or kind is OrderedDict) and not value:
        return kind, ()
    if isinstance(value, PLAIN):
        return kind, value
    if depth and isinstance(value, Mapping):
        return type(value), tuple((repr(key), _by_value(entry, depth - 1, alike)) for key, entry in value.items())
    if depth and isinstance(value, (list, tuple)):
        return type(value), tuple(_by_value(entry, depth - 1, alike) for entry in value)
    # An attention processor is no module, but has attributes of its own.
    if depth and "Processor" in type(value).__name__:
        return type(value) if alike else Same(value), type(value), _by_value(vars(value), depth - 1, alike)
    if alike and type(value) in (torch.Tensor, torch.nn.Parameter):
        return type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if alike and isinstance(value, torch.nn.Module):
        return (type(value),)
    if alike and isinstance(value, (set, frozenset)):
        return type(value), frozenset(value)
    return Same(value)
