"""Have facts changed since they were last looked at? Asked at the beginning of every run, so that it has to be cheap."""

import operator
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import nn

from stepgraph.runtime.program.bound_weights import version_of
from stepgraph.runtime.program.facts import HOOKS, STORES, Difference, Facts, Strength
from stepgraph.runtime.program.freeze import Containers, bytes_of, content_of, freeze
from stepgraph.runtime.program.process_state import process_state
from stepgraph.wrapped_models import refuse_offload

Space = Mapping[str, Any]
# Where libraries keep what moves or casts a module's weights while it runs; they replace its forward as well, but for the
# model's own that is not looked at.
OFFLOADS = ("_hf_hook", "_diffusers_hook")
_kept_of = operator.itemgetter(*STORES, *HOOKS)
# Past the attributes that `nn.Module` looks up in other ways.
_attributes_of = vars(nn.Module)["__dict__"].__get__
# What every module keeps, whose contents are compared apart.
KEPT = (*STORES, *HOOKS)
# From how many spaces on it is faster to look up all their names together than one by one.
MANY = 8


class FactsWatch:
    """Compares facts with a model, and lets strengths follow; from any number of threads.

    Attributes:
        others: Strengths that have other numbers than at the trace, each with what to say of it, as the last comparison found.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.others = facts, tuple[tuple[Strength, str], ...]()
        self._lock = threading.Lock()
        self._snapshot: _Snapshot | None = None

    def follow(self, model: nn.Module) -> Sequence[Difference]:
        """Write the strengths of a model to where the graph reads them, unless something else differs from the trace.

        Args:
            model: The one that the program was made for, or put on.

        Returns:
            What differs.

        Raises:
            CompileError: Hooks move or cast its weights while it runs.
        """
        snapshot = self._snapshot
        if snapshot is not None and snapshot.model is model and snapshot.holds():
            snapshot.note_tensors()
            return ()
        with self._lock:
            # Taken first: what changes meanwhile is noticed the next time.
            snapshot = _Snapshot(model, self.facts)
            refuse_offload(model)
            differences = list(self.facts.differences(model))
            if not differences:
                self._write_strengths(model)
                snapshot.note_versions()
                self._snapshot = snapshot
            return differences

    def strengths_hold(self, model: nn.Module) -> bool:
        """Whether strengths are what the last comparison found; for every step, so tensors go by their versions."""
        snapshot = self._snapshot
        return snapshot is None or snapshot.model is not model or snapshot.strengths_hold()

    @property
    def tree(self) -> object:
        """Stands for the modules that the last comparison found, with the dicts in which they keep tensors."""
        return self._snapshot

    @property
    def versions(self) -> tuple[int, ...]:
        """How often strengths have been written to where the graph reads them."""
        return tuple(constant._version for strength in self.facts.strengths for constant in strength.constants)

    def _write_strengths(self, model: nn.Module) -> None:
        """Write them all, and take down which have other numbers than at the trace."""
        others = []
        with torch.inference_mode(False), torch.no_grad():
            for strength in self.facts.strengths:
                value = strength.value(model)
                if repr(value) != repr(strength.compiled):
                    said = f"{strength.path} is {value}, and was {strength.compiled} when the plan was compiled"
                    others.append((strength, said))
                for constant in strength.constants:
                    _write(constant, value)
        self.others = tuple(others)


def _write(constant: torch.Tensor, value: float) -> None:
    """Write a number; not where it is there already, so that what was computed of it stays good."""
    before = float(constant)
    if repr(before) != repr(value):
        constant.fill_(value)


class _Snapshot:
    """Everything that facts are about, as objects, to compare by identity.

    All of it is done by iterators of C, over what lies flat in lists: a model has thousands of attributes.
    """

    def __init__(self, model: nn.Module, facts: Facts) -> None:
        self.model = model
        modules = {path: module for path, module in model.named_modules() if path in facts.parts}
        self._modules, self._kinds = list(modules.values()), list(map(type, modules.values()))
        self._empty: list[Mapping[Any, Any]] = []
        filled: list[tuple[Space, str]] = []
        absent: list[tuple[Space, str]] = []
        spaces: list[tuple[Space, tuple[str, ...]]] = []
        containers = Containers()

        def watch(space: Space, names: Iterable[str]) -> None:
            present = tuple(name for name in names if name in space)
            for name in present:
                if name not in OFFLOADS:
                    freeze(space[name], containers)
            spaces.append((space, present))
            absent.extend((space, name) for name in names if name not in space)

        for path, module in modules.items():
            attributes, outermost = vars(module), path == ""
            for kind in STORES if outermost else KEPT:
                if attributes[kind]:
                    filled.append((attributes, kind))
                else:
                    self._empty.append(attributes[kind])
            watch(attributes, [*(OFFLOADS if outermost else ("forward",)), *facts.parts[path].values])
        for names in facts.names:
            watch(names.space, names.values)

        self._where_absent, self._names_absent = [space for space, _ in absent], [name for _, name in absent]
        members = containers.members.values()
        self._looks = _looks(operator.itemgetter, operator.getitem, spaces) + _looks(operator.attrgetter, getattr, members)
        self._attributes = [vars(module) for module in modules.values()]
        self._looks.append(_Look(partial(map, _attributes_of, self._modules)))
        self._kept = list(map(_kept_of, self._attributes))
        spaces_filled, kinds_filled = [space for space, _ in filled], [kind for _, kind in filled]
        self._looks.append(_Look(partial(map, operator.getitem, spaces_filled, kinds_filled)))
        # What became of parameters and buffers is seen where their values are (`BoundWeights`), here only that none came.
        counted = [space[kind] for space, kind in filled if kind in STORES[:2]]
        # A plain attribute that is new may hide a tensor or a submodule.
        self._sized = self._attributes + counted
        self._sizes = list(map(len, self._sized))
        self._unset = containers.absent
        self._values = _Contents([space[kind] for space, kind in filled if kind not in STORES[:2]])
        self._empty += [container for container in containers.dicts.values() if not container]
        self._contents = _Keyed([container for container in containers.dicts.values() if container])
        self._lists = [(container, list(container)) for container in containers.lists.values()]
        self._sets = [(container, set(container)) for container in containers.sets.values()]
        self._buffers = [(buffer, bytes_of(buffer)) for buffer in containers.buffers.values()]
        self._cells = [(cell, content_of(cell)) for cell in containers.cells.values()]
        self._asked = frozenset(facts.process)
        self._process = process_state(self._asked)
        self._constants = [constant for strength in facts.strengths for constant in strength.constants]
        complete = _complete(modules, facts)
        places = [_place(modules, strength) for strength in facts.strengths] if complete else []
        self._holders: list[Space] = [holder for holder, _ in places]
        self._names = [name for _, name in places]
        # Strengths that peft's hot-swapping writes to in place are tensors.
        held = self._strengths = list(map(operator.getitem, self._holders, self._names))
        self._tensors = [one for one in held if isinstance(one, torch.Tensor)]
        self._numbers = _numbers(self._tensors)
        self.note_tensors()
        self.note_versions()

    def strengths_hold(self) -> bool:
        """Whether strengths are the same objects still, and were not written to."""
        try:
            same = all(map(operator.is_, map(operator.getitem, self._holders, self._names), self._strengths))
        except KeyError:
            return False
        return same and list(map(version_of, self._tensors)) == self._written

    def note_tensors(self) -> None:
        """Take down how often the tensors among the strengths have been written to."""
        self._written = list(map(version_of, self._tensors))

    def note_versions(self) -> None:
        """Take down how often strengths have been written: another program may read the same ones."""
        self._versions = [constant._version for constant in self._constants]

    def holds(self) -> bool:
        """Whether everything is the same object still."""
        return (
            list(map(type, self._modules)) == self._kinds
            and list(map(len, self._sized)) == self._sizes
            and not any(self._empty)
            and self._values.hold()
            and all(look.holds() for look in self._looks)
            # Of dicts that are empty, others are as good.
            and all(map(operator.eq, map(_kept_of, self._attributes), self._kept))
            and not any(map(operator.contains, self._where_absent, self._names_absent))
            and self._contents.hold()
            and self._members_hold()
            and process_state(self._asked) == self._process
            and [constant._version for constant in self._constants] == self._versions
            and _numbers(self._tensors) == self._numbers
        )

    def _members_hold(self) -> bool:
        """Whether lists, sets, arrays, closures and slots hold what they held."""
        return (
            all(len(now) == len(before) and all(map(operator.is_, now, before)) for now, before in self._lists)
            and all(now == before for now, before in self._sets)
            and all(bytes_of(now) == before for now, before in self._buffers)
            and not any(hasattr(value, name) for value, name in self._unset)
            and all(content_of(cell) is before for cell, before in self._cells)
        )


def _complete(modules: Mapping[str, nn.Module], facts: Facts) -> bool:
    """Whether every strength is where it was."""
    for strength in facts.strengths:
        holder = vars(modules[strength.module]).get(strength.name) if strength.module in modules else None
        if holder is None or (strength.key and not (isinstance(holder, Mapping) and strength.key[0] in holder)):
            return False
    return True


def _place(modules: Mapping[str, nn.Module], strength: Strength) -> tuple[Space, Any]:
    """Where a strength is looked up, and under which name."""
    attributes = vars(modules[strength.module])
    return (attributes[strength.name], strength.key[0]) if strength.key else (attributes, strength.name)


def _numbers(tensors: Sequence[torch.Tensor]) -> list[float]:
    """What tensors [] hold."""
    return torch.stack([tensor.detach().to(tensors[0]) for tensor in tensors]).tolist() if tensors else []


class _Look:
    """What names mean in spaces, or objects have under them."""

    def __init__(self, look: Callable[[], Iterable[Any]]) -> None:
        self._now = look
        self._before = list(look())

    def holds(self) -> bool:
        """Whether they mean the same objects still."""
        try:
            return all(map(operator.is_, self._now(), self._before))
        except (KeyError, AttributeError):
            return False


def _looks(
    getter: Callable[..., Any], get: Callable[[Any, str], Any], spaces: Iterable[tuple[Any, tuple[str, ...]]]
) -> list[_Look]:
    """Looks at spaces for names: at many spaces for the same names together, at all others for one name after another."""
    groups: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for space, names in spaces:
        groups[names].append(space)
    looks, single = [], list[tuple[Any, str]]()
    for names, group in groups.items():
        if names and len(group) * len(names) >= MANY:
            looks.append(_Look(partial(_all_of if len(names) > 1 else map, getter(*names), group)))
        else:
            single += product(group, names)
    return [*looks, _Look(partial(map, get, [space for space, _ in single], [name for _, name in single]))]


def _all_of(getter: Callable[[Any], Iterable[Any]], group: Sequence[Any]) -> Iterable[Any]:
    return chain.from_iterable(map(getter, group))


class _Contents:
    """What dicts hold, in order."""

    _values_of: Callable[[Any], Iterable[Any]] = staticmethod(dict.values)

    def __init__(self, dicts: Sequence[Mapping[Any, Any]]) -> None:
        self._dicts = list(dicts)
        self._sizes, self._before = list(map(len, self._dicts)), list(self._now())

    def _now(self) -> Iterable[Any]:
        return chain.from_iterable(map(self._values_of, self._dicts))

    def hold(self) -> bool:
        """Whether it is the same objects still."""
        return list(map(len, self._dicts)) == self._sizes and all(map(operator.is_, self._now(), self._before))


class _Keyed(_Contents):
    """What dicts hold, under the keys that they have; dicts of classes among them."""

    _values_of = staticmethod(operator.methodcaller("values"))

    def __init__(self, dicts: Sequence[Mapping[Any, Any]]) -> None:
        super().__init__(dicts)
        self._keys: list[Hashable] = list(chain.from_iterable(self._dicts))

    def hold(self) -> bool:
        """Whether it is the same objects under the same keys still."""
        return super().hold() and list(chain.from_iterable(self._dicts)) == self._keys
