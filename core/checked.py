"""Arguments and fields checked against their annotations, where values enter: one mechanism for all public functions.

What an annotation cannot say (a range, a known name, shapes that belong together) is checked by whoever knows it (`checks`).
"""

import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, Union

import torch
from torch import nn

from stepgraph.checks import LARGEST, is_number, shown
from stepgraph.errors import ArgumentError

P = ParamSpec("P")
T = TypeVar("T")

# Bytes of a file's name, on the usual file systems.
LONGEST_NAME = 255

WORDS: Mapping[Any, str] = {
    int: "a whole number", float: "a number", bool: "True or False", str: "a text", types.NoneType: "None", bytes: "bytes",
    nn.Module: "a model (torch.nn.Module)", torch.Tensor: "a tensor", torch.device: "a device", torch.dtype: "a torch.dtype",
}  # fmt: skip


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """A function that refuses arguments of other types than it is annotated with, by name, before it does anything.

    Raises:
        ArgumentError: An argument is of another type; the message says what is expected. Arguments that are missing, or that
            there are none of, are Python's own TypeError.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            # Python words it better, with the function's name.
            return function(*args, **kwargs)
        for name, annotation in _annotations(function).items():
            if name not in bound.arguments:
                continue
            parameter, value = signature.parameters[name], bound.arguments[name]
            if parameter.kind is parameter.VAR_KEYWORD:
                for key, entry in value.items():
                    check_type(key, entry, annotation)
            elif parameter.kind is parameter.VAR_POSITIONAL:
                for i, entry in enumerate(value):
                    check_type(f"{name}[{i}]", entry, annotation)
            else:
                check_type(name, value, annotation)
        return function(*args, **kwargs)

    return call


def check_fields(record: Any, where: str = "") -> None:
    """Refuse a record (a dataclass) with a field of another type than it is annotated with; called in its `__post_init__`.

    Raises:
        ArgumentError: See `checked`.
    """
    hints = _field_types(typing.cast(Hashable, type(record)))
    for name, annotation in hints.items():
        check_type(f"{where}{name}", getattr(record, name), annotation)


def check_type(name: str, value: Any, annotation: Any) -> None:
    """Refuse a value of another type than an annotation says.

    Raises:
        ArgumentError: The message names the value, and the entry of it where that is what is wrong.
    """
    if fits(value, annotation):
        return
    place, entry, expected = _what_is_wrong(name, value, annotation)
    raise ArgumentError(f"{place} is {shown(entry)}; expected {in_words(expected)}")


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is what an annotation says. True and false are no numbers; whole numbers are numbers."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, object) or isinstance(annotation, (TypeVar, str)):
        return True
    if origin in (Union, types.UnionType):
        named = not {str, Path} <= set(members) or not isinstance(value, (str, Path)) or _can_be_named(value)
        return named and any(fits(value, member) for member in members)
    if annotation is None:
        return value is None
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if annotation is float:
        return isinstance(value, float) or is_number(value)
    if origin is Callable:
        return callable(value)
    if origin is None:
        return not isinstance(annotation, type) or getattr(annotation, "_is_protocol", False) or isinstance(value, annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        sides = ((value.keys(), members[0]), (value.values(), members[1])) if isinstance(value, Mapping) else ()
        return bool(sides) and all(fits(entry, kind) for side, kind in sides for entry in _one_of_each(side, kind))
    if origin is tuple and members[-1:] != (...,):
        return isinstance(value, (list, tuple)) and len(value) == len(members) and all(map(fits, value, members))
    if isinstance(origin, type) and (origin is tuple or issubclass(origin, Sequence)):
        listed = isinstance(value, (list, tuple)) or (isinstance(value, Sequence) and not isinstance(value, (str, bytes)))
        return listed and all(fits(entry, members[0]) for entry in _one_of_each(value, members[0]))
    return isinstance(value, origin)


def _can_be_named(path: str | Path) -> bool:
    """Whether a file system has names such as a path's."""
    return "\0" not in str(path) and all(len(os.fsencode(part)) <= LONGEST_NAME for part in Path(path).parts)


def _one_of_each(entries: Iterable[Any], annotation: Any) -> Iterable[Any]:
    """The entries, or one of each class where an annotation asks for the class alone: a plan has thousands of sites."""
    plain = typing.get_origin(annotation) is None and isinstance(annotation, type)
    return {type(entry): entry for entry in entries}.values() if plain else entries


def in_words(annotation: Any) -> str:
    """What an annotation asks for."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation in WORDS:
        return WORDS[annotation or types.NoneType]
    if origin in (Union, types.UnionType):
        others = [member for member in members if member is not Path or str not in members]
        paths = {str: "a path"} if Path in members else {}
        return ", or ".join(dict.fromkeys(paths.get(member) or in_words(member) for member in others))
    if origin is Callable:
        return "a function"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping by name" if members[0] is str else "a mapping"
    if origin is tuple and members[-1:] != (...,):
        return f"({', '.join(map(in_words, members))})"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each entry {in_words(members[0])}" if members[0] is not Any else "a list"
    kind = getattr(origin or annotation, "__name__", str(annotation))
    return f"an {kind}" if kind[0] in "AEIOU" else f"a {kind}"


def _what_is_wrong(name: str, value: Any, annotation: Any) -> tuple[str, Any, Any]:
    """The place, the value and the annotation of the first entry that does not fit, where that is not the whole."""
    for kind in typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,):
        origin, members = typing.get_origin(kind), typing.get_args(kind)
        if not isinstance(origin, type) or not members:
            continue
        if issubclass(origin, Mapping) and isinstance(value, Mapping):
            for key, entry in value.items():
                if not fits(key, members[0]):
                    return f"a key of {name}", key, members[0]
                if not fits(entry, members[1]):
                    return _what_is_wrong(f"{name}[{shown(key)}]", entry, members[1])
        many = members[-1:] == (...,) or (issubclass(origin, Sequence) and origin is not tuple)
        if many and isinstance(value, (list, tuple)):
            for i, entry in enumerate(value):
                if not fits(entry, members[0]):
                    return _what_is_wrong(f"{name}[{i}]", entry, members[0])
    return name, value, annotation


@functools.cache
def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's parameters' annotations; a text that names nothing when it is first called stays a text."""
    stated = {name: note for name, note in function.__annotations__.items() if name != "return"}
    return {name: _resolved(note, getattr(function, "__globals__", {})) for name, note in stated.items()}


def _resolved(annotation: Any, names: Mapping[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(names))
    except NameError:
        return annotation


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}
