"""What functions read of the globals of their modules, by the names in their code."""

import functools
from collections.abc import Iterable, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from stepgraph.runtime.program.facts import NOTHING, Names
from stepgraph.runtime.program.freeze import LIBRARIES, Frozen, content_of, freeze

# The recorder itself, and libraries whose functions are the same or are not.
STRANGE = LIBRARIES | {"stepgraph", "builtins"}
# How far names lead through modules: torch.nn.functional.gelu.
DEPTH = 4


class Globals:
    """Values that the code of some functions, and of those that they can reach, may read outside of objects."""

    def __init__(self) -> None:
        self._spaces: dict[int, tuple[str, Mapping[str, Any], dict[str, Frozen]]] = {}
        # By identity: to tell code apart by what it says takes long.
        self._codes: dict[int, CodeType] = {}

    def names(self) -> tuple[Names, ...]:
        """All of them as they were when they were met."""
        return tuple(Names(label, space, values) for label, space, values in self._spaces.values())

    def note(self, label: str, space: Mapping[str, Any], name: str) -> None:
        """Take down what a name means in a space, and what functions it leads to."""
        # A class hands out its dict in a new wrapper each time; the label says whose it is.
        key = id(space) if isinstance(space, dict) else hash(label)
        values = self._spaces.setdefault(key, (label, space, {}))[2]
        if name not in values:
            values[name] = freeze(space[name]) if name in space else NOTHING
            self.add_value(space.get(name))

    def add_value(self, value: Any) -> None:
        """Take down what a value's functions read, if it has any."""
        if isinstance(value, FunctionType):
            if value.__module__ is None or value.__module__.partition(".")[0] not in STRANGE:
                self.add_code(value.__code__, value.__globals__)
            for cell in value.__closure__ or ():
                if content_of(cell) is not value:
                    self.add_value(content_of(cell))
        elif isinstance(value, (staticmethod, classmethod, MethodType)):
            self.add_value(value.__func__)
        elif isinstance(value, property):
            self.add_value(value.fget)
        elif isinstance(value, functools.partial):
            self.add_value(value.func)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.add_value(value.__wrapped__)
        elif not isinstance(value, (type, ModuleType)) and not _is_strange(type(value)):
            self._add_method(type(value), "__call__")

    def _add_method(self, kind: type, name: str) -> None:
        """What runs when an object is called."""
        for owner in kind.__mro__:
            if name in vars(owner) and not _is_strange(owner):
                self.note(f"{owner.__qualname__}.", vars(owner), name)
                return

    def add_code(self, code: CodeType, space: Mapping[str, Any]) -> None:
        """Take down what a function, with those written within it, reads of its globals."""
        if id(code) in self._codes:
            return
        self._codes[id(code)] = code
        if str(space.get("__name__")).partition(".")[0] in STRANGE:
            return
        self._add_names(f"{space.get('__name__')}.", space, code.co_names, DEPTH)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self.add_code(constant, space)

    def _add_names(self, label: str, space: Mapping[str, Any], names: Iterable[str], depth: int) -> None:
        """Names that stand in a space; modules and classes among them are looked into for the same names."""
        for name in names:
            value = space.get(name, NOTHING)
            if value is NOTHING or name.startswith("__"):
                continue
            if isinstance(value, ModuleType):
                if depth:
                    self._add_names(f"{value.__name__}.", vars(value), names, depth - 1)
                continue
            if isinstance(value, type) and not _is_strange(value) and depth:
                self._add_names(f"{value.__qualname__}.", vars(value), names, 0)
            self.note(label, space, name)


def _is_strange(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in STRANGE
