"""What functions read of the globals of their modules and of the classes of objects, by the names in their code."""

import dis
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch

from stepgraph.runtime.program.facts import NOTHING, Names
from stepgraph.runtime.program.freeze import LIBRARIES, Containers, Frozen, freeze, root_of
from stepgraph.runtime.program.process_state import ASKED, QUESTION

# The recorder itself, and libraries whose functions are the same or are not.
STRANGE = LIBRARIES | {"stepgraph", "builtins"}
# How far names lead through modules: torch.nn.functional.gelu.
DEPTH = 4
IMPORT_NAME = dis.opmap["IMPORT_NAME"]
# What runs when an object is made; and when one is shown, copied or thrown away, which is no use of it.
MAKING = frozenset({"__init__", "__new__", "__post_init__"})
ASIDE = frozenset({"__repr__", "__str__", "__del__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__",
                   "__deepcopy__", "__getnewargs__", "__init_subclass__", "__set_name__"})  # fmt: skip


class Globals:
    """Values that the code of some functions, and of those that they can reach, may read outside of objects."""

    def __init__(self) -> None:
        self._spaces: dict[int, tuple[str, Mapping[str, Any], dict[str, Frozen]]] = {}
        # By identity: to tell code apart by what it says takes long.
        self._codes: dict[int, CodeType] = {}
        # Names in all code, classes that it may look them up in, and what it imports.
        self._names: dict[str, None] = {}
        self._kinds: dict[type, bool] = {}
        self._imports: list[tuple[str, tuple[str, ...]]] = []

    def names(self) -> tuple[Names, ...]:
        """All of them as they were when they were met; of classes, what the names in the code mean there now."""
        self._resolve()
        return tuple(Names(label, space, values) for label, space, values in self._spaces.values())

    @property
    def asked(self) -> frozenset[str]:
        """The settings of the process that the code asks for, as `process_state` takes them."""
        return frozenset(QUESTION + name for name in ASKED if name in self._names)

    def frozen(self, value: Any) -> Frozen:
        """A value as it is; what its functions and its objects' methods read is taken down."""
        containers = Containers()
        frozen = freeze(value, containers)
        for function in containers.functions.values():
            if root_of(function) not in STRANGE:
                self.add_code(function.__code__, function.__globals__)
        for kind in containers.kinds:
            # A class that is a value itself may be asked to make an object.
            self._kinds[kind] = self._kinds.get(kind, False) or kind is value
            self._kinds.setdefault(type(kind), False)
        return frozen

    def note(self, label: str, space: Mapping[str, Any], name: str, owner: object = None) -> None:
        """Take down what a name means in a space, and what functions it leads to.

        Args:
            label: What messages put before the name.
            space: Where it is looked up.
            name: Which.
            owner: Whose the space is; a class hands out its dict in a new wrapper each time.
        """
        values = self._spaces.setdefault(id(space if owner is None else owner), (label, space, {}))[2]
        if name not in values:
            values[name] = NOTHING
            if name in space:
                values[name] = self.frozen(space[name])
                if isinstance(space[name], (FunctionType, BuiltinFunctionType)) and space[name].__name__ in ASKED:
                    # Imported under a name of its own.
                    self._names[space[name].__name__] = None

    def note_of_class(self, kind: type, name: str) -> None:
        """Take down what a class and its bases have under a name."""
        for owner in kind.__mro__:
            if owner is not object:
                self.note(f"{owner.__qualname__}.", vars(owner), name, owner)
            if name in vars(owner):
                return

    def add_code(self, code: CodeType, space: Mapping[str, Any]) -> None:
        """Take down what a function, with those written within it, reads of its globals."""
        if id(code) in self._codes:
            return
        self._codes[id(code)] = code
        if str(space.get("__name__")).partition(".")[0] in STRANGE:
            return
        self._names |= dict.fromkeys(code.co_names)
        # Of names that are put together or passed on (`getattr`, `globals()`, `attrgetter`, `eval`), the texts are here.
        texts = dict.fromkeys(_names_in_texts(code))
        self._names |= texts
        self._imports += [(module, code.co_names) for module in _imports(code, space)]
        self.add_names(f"{space.get('__name__')}.", space, dict.fromkeys([*code.co_names, *texts]))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self.add_code(constant, space)

    def add_names(self, label: str, space: Mapping[str, Any], names: Iterable[str], depth: int = DEPTH) -> None:
        """Names that stand in a space; modules among them are looked into for the same names."""
        for name in names:
            value = space.get(name, NOTHING)
            if value is NOTHING or name.startswith("__"):
                continue
            if not isinstance(value, ModuleType):
                self.note(label, space, name)
            elif depth:
                self.add_names(f"{value.__name__}.", vars(value), names, depth - 1)

    def _resolve(self) -> None:
        """Look names up in what is imported, and in classes, until that leads to no new ones."""
        seen = None
        while seen != (len(self._names), len(self._kinds), len(self._imports)):
            seen = len(self._names), len(self._kinds), len(self._imports)
            for path, names in self._imports[:]:
                if path in sys.modules:
                    self.add_names(f"{path}.", vars(sys.modules[path]), names)
            for kind, written in list(self._kinds.items()):
                for name in self._of_kind(kind, written):
                    self.note_of_class(kind, name)
        if "getenv" in self._names:
            self.note("os.", vars(os), "environ")
        # Whoever replaces a tensor's method does so for all.
        for name in self._names:
            if not name.startswith("__") and hasattr(torch.Tensor, name):
                self.note("torch.Tensor.", vars(torch.Tensor), name, torch.Tensor)

    def _of_kind(self, kind: type, made: bool) -> Iterator[str]:
        """The names of a class that the code may look up, and what operators call."""
        for owner in kind.__mro__:
            if root_of(owner) in STRANGE:
                continue
            for name, value in list(vars(owner).items()):
                special = name.startswith("__") and callable(value) and name not in ASIDE and (made or name not in MAKING)
                if special or name in self._names:
                    yield name


def _names_in_texts(code: CodeType) -> Iterator[str]:
    """The names among the texts in a function's code: alone or dotted, and in what is evaluated any."""
    evaluated = not {"eval", "exec"}.isdisjoint(code.co_names)
    for text in code.co_consts:
        if isinstance(text, str):
            parts = re.findall(r"[^\W\d]\w*", text) if evaluated else text.split(".")
            yield from parts if all(map(str.isidentifier, parts)) else ()


def _imports(code: CodeType, space: Mapping[str, Any]) -> Iterator[str]:
    """The modules that a function imports when it runs, and those that it names in texts."""
    if IMPORT_NAME in code.co_code[::2]:
        level = 0
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                package = str(space.get("__package__") or space.get("__name__"))
                name = "." * level + str(instruction.argval)
                yield importlib.util.resolve_name(name, package) if level else name
            elif isinstance(instruction.argval, int) and not isinstance(instruction.argval, bool):
                level = instruction.argval
    if "import_module" in code.co_names:
        yield from (text for text in code.co_consts if isinstance(text, str))
