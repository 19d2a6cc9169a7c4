"""Tests hand the traces of their models on to each other, as the product does within one chain of calls.

Tracing is most of what a tiny model's compilation takes. A trace is handed on only while all that it could have read of the
model is what it was: every attribute of every module, plain values and what dicts and lists hold by value, all else by
identity. What lies outside the model (a patched function of torch, say) is not seen: tests of such things are marked `traces`.
"""

import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from stepgraph.compiler.marking import traced_model
from stepgraph.compiler.tracing.trace import Trace
from stepgraph.runtime.program.program import signature

trace_anew = traced_model.trace
# Beside each trace its key, which keeps the objects that it compares alive: a new object cannot take the place of an old one.
_known: "weakref.WeakKeyDictionary[torch.nn.Module, dict[Hashable, Trace]]" = weakref.WeakKeyDictionary()
DEPTH = 4


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
    key = (signature(inputs), tuple(inputs), facts_of(model), torch.get_default_dtype())
    if key not in traces:
        traces[key] = trace_anew(model, inputs)
    return traces[key]


def facts_of(model: torch.nn.Module) -> Hashable:
    """Everything that a forward can read of its model."""
    return tuple(
        (path, type(module), Same(type(module).forward), _by_value(vars(module), DEPTH))
        for path, module in model.named_modules()
    )


def _by_value(value: Any, depth: int) -> Hashable:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return type(value), value
    if depth and isinstance(value, Mapping):
        return type(value), tuple((repr(key), _by_value(entry, depth - 1)) for key, entry in value.items())
    if depth and isinstance(value, (list, tuple)):
        return type(value), tuple(_by_value(entry, depth - 1) for entry in value)
    # An attention processor is no module, but has attributes of its own.
    if depth and type(value).__name__.endswith("Processor"):
        return Same(value), type(value), _by_value(vars(value), depth - 1)
    return Same(value)
