"""What a forward reads while it is traced, beside its inputs and the contents of weights."""

import sys
import threading
from collections.abc import Iterator
from functools import cache
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

from stepgraph.adapters import active_in
from stepgraph.compiler.tracing.read_globals import Globals
from stepgraph.compiler.tracing.strengths import HALVES, Place, Strengths
from stepgraph.runtime.program.facts import GATE, NOTHING, Facts, Names, Strength, facts_of
from stepgraph.runtime.program.freeze import LIBRARIES, Frozen, freeze

# What every module has, and its calls look at.
OF_EVERY_MODULE = frozenset(dir(nn.Module())) - {"training"}


class Reads:
    """Takes down what is read of modules, on the thread that made it, and in the functions that run.

    Args:
        model: Whose forward is traced.
        strengths: What floats become.
        again: Whether this was all taken down before, and only strengths are handed out.
    """

    def __init__(self, model: nn.Module, strengths: Strengths, again: bool = False) -> None:
        self.model, self.strengths, self._again = model, strengths, again
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.values: dict[str, dict[str, Frozen]] = {path: {} for path in self.paths.values()}
        self.others: dict[int, tuple[nn.Module, dict[str, Frozen]]] = {}
        self.globals = Globals()
        self._kinds: set[tuple[type, str]] = set()
        self._seen: set[tuple[int, str]] = set()
        self._thread = threading.get_ident()

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """Take down that an attribute was read; returns what the forward gets for it."""
        if name in OF_EVERY_MODULE or threading.get_ident() != self._thread or name.startswith("__"):
            return value
        attributes = object.__getattribute__(module, "__dict__")
        if not self._again and (id(module), name) not in self._seen:
            self._note(module, name, attributes)
        path = self.paths.get(id(module))
        if path is None or name not in attributes:
            return value
        return self.strengths.read(path, name, value, type(module))

    def note_absent(self, module: nn.Module, name: str) -> None:
        """Take down that a module was asked for what it does not have."""
        if not self._again and threading.get_ident() == self._thread and not name.startswith("__"):
            self._note(module, name, object.__getattribute__(module, "__dict__"))

    def _note(self, module: nn.Module, name: str, attributes: dict[str, Any]) -> None:
        self._seen.add((id(module), name))
        path = self.paths.get(id(module))
        values = self.others.setdefault(id(module), (module, {}))[1] if path is None else self.values[path]
        if name in attributes:
            if name != "training" or attributes.get("p") != 0.0:
                values[name] = freeze(attributes[name])
                self.globals.add_value(attributes[name])
            return
        self._of_class(type(module), name)
        values[name] = NOTHING

    def _of_class(self, kind: type, name: str) -> None:
        """Take down what the classes of a module have under a name."""
        for owner in kind.__mro__:
            if (owner, name) not in self._kinds and owner not in (object, nn.Module):
                self._kinds.add((owner, name))
                self.globals.note(f"{owner.__qualname__}.", vars(owner), name)
            if name in vars(owner):
                return

    def note_frames(self) -> None:
        """Take down which functions of the model are running."""
        frame: FrameType | None = None if self._again else sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__") != "stepgraph.compiler.tracing.trace":
            self.globals.add_code(frame.f_code, frame.f_globals)
            frame = frame.f_back

    def note_leaf(self, module: nn.Module) -> None:
        """Take down what one of torch.nn's own modules reads of itself; its results may be known, and its forward not run."""
        if self._again:
            return
        for part in (module, *_below(module)):
            attributes = object.__getattribute__(part, "__dict__")
            kind: type = type(part)
            for name in names_in_forward(kind):
                if name in attributes and name not in OF_EVERY_MODULE and (id(part), name) not in self._seen:
                    self._note(part, name, attributes)

    def facts(self) -> Facts:
        """All of it; after the forward."""
        for kind in {type(module) for module in self.model.modules()}:
            if kind.__module__.partition(".")[0] not in LIBRARIES:
                self._of_class(kind, "forward")
        others = tuple(Names(f"a {type(m).__name__} in no module: ", vars(m), read) for m, read in self.others.values())
        numbers = self.strengths
        strengths = [self._strength(place) for place in sorted(numbers.places.keys() - numbers.fixed, key=repr)]
        followed = tuple(strength for strength in strengths if strength.constants)
        unread = frozenset(Strength(*place, 0.0, ()).path for place in numbers.unread - numbers.fixed)
        return facts_of(self.model, self.values, (*others, *self.globals.names()), followed, unread)

    def _strength(self, place: Place) -> Strength:
        constants = tuple(constant for (of, _), constant in self.strengths.constants.items() if of == place)
        dtype = self.strengths.halves.get(place)
        halves = dtype if dtype in HALVES else None
        return Strength(*place, self.strengths.places[place], constants, halves, self._is_gated(place))

    def _is_gated(self, place: Place) -> bool:
        """Whether a strength is of a LoRA prepared for hot-swapping that is all its layer adds: it is off where this is 0."""
        attributes = vars(self.model.get_submodule(place[0]))
        active = [name for name in active_in(self.model.get_submodule(place[0])) if name in attributes.get("scaling", {})]
        places = {(place[0], "scaling", (name,)) for name in active}
        plain = not attributes.get("lora_variant") and not attributes.get("merged_adapters") and not attributes.get(GATE)
        followed = {of for of, _ in self.strengths.constants} - self.strengths.fixed
        return plain and place in self.strengths.tensors and place in places <= followed & self.strengths.tensors


def _below(module: nn.Module) -> Iterator[nn.Module]:
    """The modules within a module, without reading an attribute of theirs."""
    for child in object.__getattribute__(module, "__dict__")["_modules"].values():
        if child is not None:
            yield child
            yield from _below(child)


@cache
def names_in_forward(kind: type) -> frozenset[str]:
    """The names in the code of a class's forward, and of those of its methods that this names."""
    names, pending = set[str](), ["forward"]
    while pending:
        method = getattr(kind, pending.pop(), None)
        codes = [method.__code__] if isinstance(method, FunctionType) else []
        while codes:
            code = codes.pop()
            pending += [name for name in code.co_names if name not in names and name in dir(kind)]
            names |= set(code.co_names)
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(names)
