"""What a forward reads while it is traced, beside its inputs and the contents of weights."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

from stepgraph.adapters import active_in
from stepgraph.compiler.tracing.read_globals import Globals
from stepgraph.compiler.tracing.strengths import HALVES, Place, Strengths, write_through
from stepgraph.runtime.program.facts import GATE, NOTHING, STORES, Facts, Strength, facts_of
from stepgraph.runtime.program.freeze import LIBRARIES, Frozen, root_of

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
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
        self.globals = Globals()
        self._others: list[nn.Module] = []
        self._slices: set[int] = set()
        self._kinds: set[tuple[type, str]] = set()
        self._seen: set[tuple[int, str]] = set()
        self._thread = threading.get_ident()

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """Take down that an attribute was read; returns what the forward gets for it."""
        if name in OF_EVERY_MODULE or threading.get_ident() != self._thread or name.startswith("__"):
            return self._all(module, value) if name == "__dict__" and threading.get_ident() == self._thread else value
        attributes = object.__getattribute__(module, "__dict__")
        if not self._again and (id(module), name) not in self._seen:
            self._note(module, name, attributes)
        path = self.paths.get(id(module))
        if path is None or name not in attributes:
            return value
        return self.strengths.read(path, name, value, type(module))

    def _all(self, module: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
        """What the forward gets for all attributes of a module; torch's own code reads them of every module."""
        caller = str(sys._getframe(3).f_globals.get("__name__"))
        if self._again or caller.partition(".")[0] in ("torch", "stepgraph"):
            return attributes
        return AttributesRead(attributes, lambda name: self.read(module, name, attributes.get(name)))

    def note_absent(self, module: nn.Module, name: str) -> None:
        """Take down that a module was asked for what is not among its attributes: a tensor, a submodule, or nothing."""
        if not self._again and threading.get_ident() == self._thread and not name.startswith("__"):
            self._note(module, name, object.__getattribute__(module, "__dict__"))

    def _note(self, module: nn.Module, name: str, attributes: dict[str, Any]) -> None:
        self._seen.add((id(module), name))
        path = self.paths.get(id(module))
        if path is None:
            self._of_other(module, name, attributes)
            return
        if name in attributes:
            if name != "training" or attributes.get("p") != 0.0:
                self.values[path][name] = self.globals.frozen(attributes[name])
            return
        self._of_class(type(module), name)
        # A plain attribute that comes to stand before a tensor or a submodule is a matter of the model's structure.
        if not any(name in attributes[store] for store in STORES):
            self.values[path][name] = NOTHING

    def _of_other(self, module: nn.Module, name: str, attributes: dict[str, Any]) -> None:
        """Take down what was read of a module that is none of the model's, whose tensors nobody else looks after.

        A container that is met empty is one that the forward is making, such as a slice of a ModuleList: no state of anything.
        """
        self._others.append(module)
        if type(module) in CONTAINERS and not module._modules:
            self._slices.add(id(module))
        stores = () if id(module) in self._slices else (attributes, *(attributes[store] for store in STORES))
        for store in stores:
            self.globals.note(f"a {type(module).__name__} in no module: ", store, name)
            if name in store:
                return
        self._of_class(type(module), name)

    def _of_class(self, kind: type, name: str) -> None:
        """Take down what the classes of a module have under a name."""
        if (kind, name) not in self._kinds:
            self._kinds.add((kind, name))
            self.globals.note_of_class(kind, name)

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
            self._of_class(kind, "forward")
            if root_of(kind) in LIBRARIES:
                self._of_leaf(kind)
        numbers = self.strengths
        strengths = [self._strength(place) for place in sorted(numbers.places.keys() - numbers.fixed, key=repr)]
        followed = tuple(strength for strength in strengths if strength.constants)
        unread = frozenset(Strength(*place, 0.0, ()).path for place in numbers.unread - numbers.fixed)
        return facts_of(self.model, self.values, self.globals.names(), followed, unread, self.globals.asked)

    def _of_leaf(self, kind: type) -> None:
        """Take down which functions a class of torch's computes with."""
        names = names_in_forward(kind)
        self.globals.add_names(f"{kind.__module__}.", vars(sys.modules[kind.__module__]), sorted(names))
        for name in names - OF_EVERY_MODULE:
            if isinstance(getattr(kind, name, None), FunctionType):
                self._of_class(kind, name)

    def _strength(self, place: Place) -> Strength:
        constants = tuple(constant for (of, _), constant in self.strengths.constants.items() if of == place)
        dtype = self.strengths.halves.get(place)
        halves = dtype if dtype in HALVES else None
        asked = place in self.strengths.asked
        return Strength(*place, self.strengths.places[place], constants, halves, self._is_gated(place), asked)

    def _is_gated(self, place: Place) -> bool:
        """Whether a strength is of a LoRA prepared for hot-swapping that is all its layer adds: it is off where this is 0."""
        attributes = vars(self.model.get_submodule(place[0]))
        active = [name for name in active_in(self.model.get_submodule(place[0])) if name in attributes.get("scaling", {})]
        places = {(place[0], "scaling", (name,)) for name in active}
        plain = not attributes.get("lora_variant") and not attributes.get("merged_adapters") and not attributes.get(GATE)
        followed = {of for of, _ in self.strengths.constants} - self.strengths.fixed
        return plain and place in self.strengths.tensors and place in places <= followed & self.strengths.tensors


class AttributesRead(dict[str, Any]):
    """The attributes of a module as a dict that tells what is read of it; what is written to it is written to the real one.

    Args:
        real: The module's own.
        read: Takes down that one was read; returns what the forward gets.
    """

    def __init__(self, real: dict[str, Any], read: Callable[[str], Any]) -> None:
        super().__init__(real)
        self.real, self._read = real, read

    def __getitem__(self, name: str) -> Any:
        """Read one."""
        value = self._read(name)
        return value if name in self.real else super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        """Whether there is one is read, too."""
        self._read(str(name))
        return name in self.real

    def get(self, name: str, default: Any = None) -> Any:
        """Read one that may not be there."""
        self._read(name)
        return self.real.get(name, default) if name not in self.real else self[name]

    def __iter__(self) -> Iterator[str]:
        """Whoever goes through them reads all."""
        for name in list(self.real):
            self._read(name)
            yield name

    def values(self) -> Any:
        """All of them."""
        return [self[name] for name in self]

    def items(self) -> Any:
        """All of them, by name."""
        return [(name, self[name]) for name in self]

    def keys(self) -> Any:
        """All names."""
        return list(self)

    def copy(self) -> dict[str, Any]:
        """All of them."""
        return dict(self.items())

    def note_all(self) -> None:
        """Take down that all were read."""
        list(self)


write_through(AttributesRead)


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
