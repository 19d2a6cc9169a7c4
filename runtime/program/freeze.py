"""Python values as they are at a moment, as data that can be compared with what is there later."""

import enum
import functools
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, MethodWrapperType, ModuleType, WrapperDescriptorType
from typing import Any

import numpy as np
import torch
from torch import nn

# Values that say all about themselves in their text, in which True is not 1, 1 is not 1.0 and 0.0 is not -0.0.
LEAVES = (
    bool, int, float, complex, str, bytes, type(None), type(...), enum.Enum, slice, range, torch.dtype, torch.device,
    torch.layout, torch.memory_format,
)  # fmt: skip
# What can only be another object, or the same.
OPAQUE = (
    torch.Tensor, nn.Module, type, ModuleType, BuiltinFunctionType, MethodWrapperType, WrapperDescriptorType,
    functools._lru_cache_wrapper, property, classmethod, staticmethod, torch._ops.OpOverload, torch._ops.OpOverloadPacket,
)  # fmt: skip
# How many containers within containers are looked into.
DEPTH = 4
LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "numpy"})


@dataclass(frozen=True, eq=False)
class Frozen:
    """A value at a moment.

    Attributes:
        kind: Its class.
        text: How messages show it.
        parts: What it holds, by the text that leads there: "['default']", "[0]", ".backend".
        same: What has to be the same object in an equal value; None where its class, text and parts say all.
    """

    kind: type
    text: str
    parts: tuple[tuple[str, "Frozen"], ...] = ()
    same: object = None


@dataclass(eq=False)
class Containers:
    """What can change inside values that stay the same objects, by identity."""

    dicts: dict[int, Mapping[Any, Any]] = field(default_factory=dict)
    lists: dict[int, list[Any] | deque[Any]] = field(default_factory=dict)
    sets: dict[int, set[Any]] = field(default_factory=dict)
    arrays: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    cells: dict[int, CellType] = field(default_factory=dict)


def freeze(value: Any, containers: Containers | None = None, depth: int = DEPTH) -> Frozen:
    """A value with all that it holds, down to a depth.

    Of objects, the attributes that they and their classes have; not of those of the standard library, torch and numpy, which
    are the same or are not. Entries of dicts whose name begins with "_" are no part of them.

    Args:
        value: Anything.
        containers: Takes down what can change inside it.
        depth: How far is looked; what lies deeper is told apart by its class alone.
    """
    kind = type(value)
    if isinstance(value, LEAVES):
        return Frozen(kind, repr(value))
    if isinstance(value, OPAQUE):
        return Frozen(kind, str(getattr(value, "__qualname__", f"a {kind.__qualname__}")), same=value)
    containers = Containers() if containers is None else containers
    if isinstance(value, (set, frozenset)):
        if isinstance(value, set):
            containers.sets[id(value)] = value
        return Frozen(kind, repr(sorted(map(repr, value))))
    if isinstance(value, np.ndarray):
        containers.arrays[id(value)] = value
        return Frozen(kind, f"{value.dtype} {value.shape} array {value.tobytes()!r}")
    if depth == 0:
        return Frozen(kind, f"a {kind.__qualname__}")
    parts = tuple((name, freeze(part, containers, depth - 1)) for name, part in _parts(value, containers))
    if isinstance(value, FunctionType):
        return Frozen(kind, f"{value.__module__}.{value.__qualname__}", parts, value.__code__)
    stranger = not isinstance(value, (dict, list, tuple, deque, MethodType, functools.partial))
    if stranger and kind.__module__.partition(".")[0] in LIBRARIES:
        return Frozen(kind, f"a {kind.__qualname__}", same=value)
    return Frozen(kind, f"a {kind.__qualname__} of {len(parts)}" if parts else f"a {kind.__qualname__}", parts)


def _parts(value: Any, containers: Containers) -> Iterator[tuple[str, Any]]:
    """What a value holds, by how it is reached."""
    if isinstance(value, dict):
        containers.dicts[id(value)] = value
        yield from ((f"[{key!r}]", part) for key, part in value.items() if not str(key).startswith("_"))
    elif isinstance(value, (list, tuple, deque)):
        if not isinstance(value, tuple):
            containers.lists[id(value)] = value
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, FunctionType):
        yield from _parts_of_function(value, containers)
    elif isinstance(value, MethodType):
        yield from ((".__func__", value.__func__), (".__self__", value.__self__))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    if type(value).__module__.partition(".")[0] not in LIBRARIES and not isinstance(value, FunctionType):
        yield from _attributes(value, containers)


def _parts_of_function(function: FunctionType, containers: Containers) -> Iterator[tuple[str, Any]]:
    """What a function remembers beside its code."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        containers.cells[id(cell)] = cell
        content = content_of(cell)
        # A method that says super() has its class there.
        if content is not function and not isinstance(content, type):
            yield f" ({name})", content
    for index, default in enumerate(function.__defaults__ or ()):
        yield f" (default {index})", default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield f" (default of {name})", default


def _attributes(value: Any, containers: Containers) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, and plain ones of its class; by name, for their order says nothing and copies change it."""
    attributes: dict[str, Any] = {}
    for kind in reversed(type(value).__mro__):
        if kind.__module__.partition(".")[0] in LIBRARIES:
            continue
        containers.dicts[id(kind)] = vars(kind)
        plain = {name: part for name, part in vars(kind).items() if isinstance(part, (*LEAVES, dict, list, tuple))}
        attributes |= {name: part for name, part in plain.items() if not name.startswith("__")}
        slots = [name for name, part in vars(kind).items() if type(part).__name__ == "member_descriptor"]
        attributes |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
    members = getattr(value, "__dict__", None)
    if members is not None:
        containers.dicts[id(members)] = members
        attributes |= members
    yield from ((f".{name}", part) for name, part in sorted(attributes.items()))


def content_of(cell: CellType) -> Any:
    """What a closure's variable holds; None where it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def difference(path: str, old: Frozen, new: Frozen, ignored: Mapping[str, object]) -> tuple[str, str, str] | None:
    """Where two values differ first, and what is there in each; None where they are equal.

    Args:
        path: Of the value.
        old: The one.
        new: The other.
        ignored: Paths whose numbers may be any.
    """
    if path in ignored and new.kind in (float, int):
        return None
    if old.kind is not new.kind or old.same is not new.same or (not (old.parts or new.parts) and old.text != new.text):
        shown = new.text if old.text != new.text else f"another {new.text}"
        return path, old.text, shown if new.kind is old.kind or old.text != new.text else f"{new.text} ({new.kind.__name__})"
    before, now = dict(old.parts), dict(new.parts)
    for name in [*before, *(name for name in now if name not in before)]:
        if name not in before or name not in now:
            return path + name, before[name].text if name in before else "nothing", now[name].text if name in now else "nothing"
        found = difference(path + name, before[name], now[name], ignored)
        if found is not None:
            return found
    return None if list(before) == list(now) else (path, f"entries {', '.join(before)}", f"entries {', '.join(now)}")
