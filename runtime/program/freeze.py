"""Python values as they are at a moment, as data that can be compared with what is there later."""

import array
import contextvars
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import sys
import types
import uuid
import weakref
from collections import deque
from collections.abc import Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, MethodWrapperType, ModuleType, WrapperDescriptorType
from typing import Any

import numpy as np
import torch
from torch import nn

# Values that say all about themselves in their text, in which True is not 1, 1 is not 1.0 and 0.0 is not -0.0.
LEAVES = (
    bool, int, float, complex, str, bytes, type(None), type(...), enum.Enum, slice, range, torch.dtype, torch.device,
    torch.layout, torch.memory_format, np.generic, np.dtype, pathlib.PurePath, decimal.Decimal, fractions.Fraction, uuid.UUID,
    datetime.date, datetime.time, datetime.timedelta,
)  # fmt: skip
# What can only be another object, or the same.
OPAQUE = (
    torch.Tensor, nn.Module, type, ModuleType, BuiltinFunctionType, MethodWrapperType, WrapperDescriptorType,
    torch._ops.OpOverload, torch._ops.OpOverloadPacket,
)  # fmt: skip
# The same as these, but with a function of Python in them, by the names of attributes that lead there.
WRAPPERS: dict[type, tuple[str, ...]] = {
    functools._lru_cache_wrapper: ("__wrapped__",), property: ("fget",), classmethod: ("__func__",),
    staticmethod: ("__func__",),
}  # fmt: skip
# What these are is in what they hold, wherever their classes come from.
HOLDERS = (
    dict, list, tuple, deque, MethodType, functools.partial, types.MappingProxyType, types.SimpleNamespace, weakref.ref,
    contextvars.ContextVar, KeysView, ValuesView, ItemsView,
)  # fmt: skip
BUFFERS = (np.ndarray, bytearray, array.array)
# How many containers within containers are looked into.
DEPTH = 4
LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "numpy"})
# Objects of these are doors to something else, with changing memories of their own.
DOORS = frozenset({"torch", "numpy", "logging"})
# What diffusers writes into a configuration about where it comes from.
ORIGIN = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_use_default_values", "_commit_hash"})
# What a function is beside its closure; other objects may stand in their places.
OF_FUNCTIONS = ("__code__", "__defaults__", "__kwdefaults__")


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
    """What can change inside values that stay the same objects, by identity, and whose code they bring along.

    Attributes:
        members: Objects, with the names of attributes that are stored in them.
        absent: Objects, with places for attributes that hold nothing.
        kinds: Classes of objects, and classes that are values themselves.
    """

    dicts: dict[int, Mapping[Any, Any]] = field(default_factory=dict)
    lists: dict[int, list[Any] | deque[Any]] = field(default_factory=dict)
    sets: dict[int, set[Any]] = field(default_factory=dict)
    buffers: dict[int, Any] = field(default_factory=dict)
    cells: dict[int, "CellType | contextvars.ContextVar[Any]"] = field(default_factory=dict)
    members: dict[int, tuple[object, tuple[str, ...]]] = field(default_factory=dict)
    absent: list[tuple[object, str]] = field(default_factory=list)
    functions: dict[int, FunctionType] = field(default_factory=dict)
    kinds: dict[type, None] = field(default_factory=dict)


def freeze(value: Any, containers: Containers | None = None, depth: int = DEPTH) -> Frozen:
    """A value with all that it holds, down to a depth.

    Of objects, the attributes that they and their classes have; not of those of torch and numpy, which are the same or are not.

    Args:
        value: Anything.
        containers: Takes down what can change inside it.
        depth: How far is looked; what lies deeper is told apart by its class alone.
    """
    kind = type(value)
    if isinstance(value, LEAVES):
        return Frozen(kind, repr(value))
    containers = Containers() if containers is None else containers
    if isinstance(value, OPAQUE):
        if isinstance(value, type):
            containers.kinds[value] = None
        named = not isinstance(value, (torch.Tensor, nn.Module, ModuleType))
        return Frozen(kind, str(getattr(value, "__qualname__", kind)) if named else f"a {kind.__qualname__}", same=value)
    if isinstance(value, (set, frozenset)):
        if isinstance(value, set):
            containers.sets[id(value)] = value
        return Frozen(kind, repr(sorted(map(repr, value))))
    if isinstance(value, BUFFERS):
        containers.buffers[id(value)] = value
        about = f"{value.dtype} {value.shape} array " if isinstance(value, np.ndarray) else ""
        return Frozen(kind, f"{about}{bytes_of(value)!r}")
    if depth == 0:
        return Frozen(kind, f"a {kind.__qualname__}")
    parts = tuple((name, freeze(part, containers, depth - 1)) for name, part in _parts(value, containers))
    if isinstance(value, FunctionType):
        return Frozen(kind, f"{value.__module__}.{value.__qualname__}", parts, value.__code__)
    told = isinstance(value, HOLDERS) or (kind not in WRAPPERS and _tells(value))
    text = f"a {kind.__qualname__} of {len(parts)}" if parts else f"a {kind.__qualname__}"
    return Frozen(kind, text, parts, None if told else value)


def root_of(named: type | FunctionType) -> str:
    """The library that a class or function says it is of."""
    return str(named.__module__).partition(".")[0]


def _tells(value: Any) -> bool:
    """Whether an object's attributes say what it is; C's own have none."""
    slots = any("__slots__" in vars(kind) for kind in type(value).__mro__ if root_of(kind) not in LIBRARIES)
    return root_of(type(value)) not in DOORS and (slots or hasattr(value, "__dict__"))


def _parts(value: Any, containers: Containers) -> Iterator[tuple[str, Any]]:
    """What a value holds, by how it is reached."""
    if isinstance(value, (dict, types.MappingProxyType)):
        containers.dicts[id(value)] = value
        ignored = _origin(value)
        yield from ((f"[{key!r}]", part) for key, part in value.items() if not (ignored and key in ignored))
    elif isinstance(value, (list, tuple, deque)):
        if not isinstance(value, tuple):
            containers.lists[id(value)] = value
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, FunctionType):
        yield from _parts_of_function(value, containers)
        return
    elif isinstance(value, MethodType):
        yield from ((".__func__", value.__func__), (".__self__", value.__self__))
        return
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, (KeysView, ValuesView, ItemsView)) and hasattr(value, "mapping"):
        yield ".mapping", value.mapping
    elif isinstance(value, weakref.ref):
        yield "()", value()
    elif isinstance(value, contextvars.ContextVar):
        containers.cells[id(value)] = value
        yield ".get()", content_of(value)
    elif type(value) in WRAPPERS:
        yield from ((f".{name}", getattr(value, name)) for name in WRAPPERS[type(value)])
        return
    if root_of(type(value)) not in DOORS:
        yield from _attributes(value, containers)


def _parts_of_function(function: FunctionType, containers: Containers) -> Iterator[tuple[str, Any]]:
    """What a function remembers beside its code."""
    containers.functions[id(function)] = function
    containers.members[id(function)] = function, OF_FUNCTIONS
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
    if function.__kwdefaults__:
        containers.dicts[id(function.__kwdefaults__)] = function.__kwdefaults__
    if root_of(function) not in LIBRARIES:
        containers.dicts[id(function.__dict__)] = function.__dict__
        yield from ((f".{name}", part) for name, part in function.__dict__.items())


def _attributes(value: Any, containers: Containers) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, and plain ones of its class; by name, for their order says nothing and copies change it."""
    attributes: dict[str, Any] = {}
    slots: list[str] = []
    for kind in reversed(type(value).__mro__):
        if root_of(kind) in LIBRARIES:
            continue
        containers.kinds[type(value)] = None
        containers.dicts[id(kind)] = vars(kind)
        plain = {name: part for name, part in vars(kind).items() if isinstance(part, (*LEAVES, dict, list, tuple))}
        attributes |= {name: part for name, part in plain.items() if not name.startswith("__")}
        slots += [name for name, part in vars(kind).items() if isinstance(part, types.MemberDescriptorType)]
    filled = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    members = getattr(value, "__dict__", None)
    if members is not None:
        containers.dicts[id(members)] = members
    stored = (*filled, *(("__dict__",) if members is not None else ()))
    if stored:
        containers.members[id(value)] = value, ("__class__", *stored)
    containers.absent += [(value, name) for name in slots if name not in filled]
    ignored = _origin(value)
    attributes |= filled | (members or {})
    yield from ((f".{name}", part) for name, part in sorted(attributes.items()) if name not in ignored)


def _origin(value: Any) -> frozenset[str]:
    """What is no part of a value: where a configuration comes from."""
    return ORIGIN if type(value).__name__ == "FrozenDict" else frozenset()


def bytes_of(buffer: Any) -> bytes:
    """What an array of numbers holds."""
    return bytes(buffer) if isinstance(buffer, bytearray) else bytes(buffer.tobytes())


def content_of(cell: "CellType | contextvars.ContextVar[Any]") -> Any:
    """What a closure's variable, or one of a context, holds; None where it has no value yet."""
    try:
        return cell.get() if isinstance(cell, contextvars.ContextVar) else cell.cell_contents
    except (ValueError, LookupError):
        return None


def difference(path: str, old: Frozen, new: Frozen, ignored: Collection[str]) -> tuple[str, str, str] | None:
    """Where two values differ first, and what is there in each; None where they are equal.

    Args:
        path: Of the value.
        old: The one.
        new: The other.
        ignored: Paths whose numbers, tensors [] and flags may be any.
    """
    if path in ignored and (_is_number(new) or old.kind is new.kind is bool):
        return None
    if old.kind is not new.kind or old.same is not new.same or (not (old.parts or new.parts) and old.text != new.text):
        shown = new.text if old.text != new.text else f"another {new.text}"
        return path, old.text, shown if new.kind is old.kind or old.text != new.text else f"{new.text} ({new.kind.__name__})"
    before, now = dict(old.parts), dict(new.parts)
    for name in [*before, *(name for name in now if name not in before)]:
        if name not in before or name not in now:
            return path + name, before[name].text if name in before else "nothing", now[name].text if name in now else "nothing"
        first = difference(path + name, before[name], now[name], ignored)
        if first is not None:
            return first
    return None if list(before) == list(now) else (path, f"entries {', '.join(before)}", f"entries {', '.join(now)}")


def _is_number(value: Frozen) -> bool:
    """Whether a value is a number, or a tensor that holds one."""
    return value.kind in (float, int) or (isinstance(value.same, torch.Tensor) and value.same.ndim == 0)
