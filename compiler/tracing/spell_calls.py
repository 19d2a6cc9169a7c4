"""How a call is written as a node: its operation, its target, and what its arguments can hold."""

import enum
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from stepgraph.compiler.tracing.strengths import StrengthValue

# What a node's arguments can hold beside nodes.
ARGUMENTS = (
    fx.Node, int, float, complex, str, type(None), type(...), slice, range, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
# Leaves that need no tree to be found.
PLAIN = (torch.Tensor, fx.Node, int, float, complex, str, type(None), type(...), torch.dtype, torch.device)


def spelled(func: Any, args: Any) -> tuple[str, Any, Any]:
    """How a node writes an intercepted call: (op, target, args)."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if name in OPERATORS:
        return "call_function", OPERATORS[name], args
    # Methods that torch.Tensor writes in Python, such as unflatten, are none for torch; inductor takes them only as methods.
    if torch.overrides.is_tensor_method_or_property(func) or vars(torch.Tensor).get(name) is func:
        return "call_method", name, args
    return "call_function", func, args


OPERATORS: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, name)
    for name in (
        "getitem",
        "setitem",
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "iand",
        "ior",
        "ixor",
    )
}


def mapped(apply: Callable[[Any], Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Positional and keyword arguments with every leaf replaced; most hold no containers, and need no tree to be built."""
    if type(args) is tuple and all(isinstance(leaf, PLAIN) for leaf in args):
        if not kwargs:
            return tuple(map(apply, args)), {}
        if all(isinstance(leaf, PLAIN) for leaf in kwargs.values()):
            return tuple(map(apply, args)), {name: apply(leaf) for name, leaf in kwargs.items()}
    replaced: tuple[Any, Any] = pytree.tree_map(apply, (args, kwargs))
    return replaced


def plain(leaf: Any) -> Any:
    """A strength as the number that it is, which the graph then holds for; anything else as it is."""
    return leaf.decay() if type(leaf) is StrengthValue else leaf
