"""The parameters and buffers that an executable's programs hold, and what has become of them since they were last looked at.

A program reads weights by reference, but some of what runs is made of their values: packed and merged copies, tables of a
captured run. All of it follows one look at the beginning of a run: which tensors are other objects or lie elsewhere (address),
which were written to (version), and which hold other values (contents). Contents are looked at because writes through `.data`,
as peft's and EMA's, move no version, and tensors made in inference mode have none.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress, repeat
from operator import attrgetter, getitem, is_, is_not, not_
from typing import Any

import torch
from torch import Tensor, nn

from stepgraph.adapters import base_names, changed_by_adapters
from stepgraph.contents import Scattered, content_sums, plain_tensors
from stepgraph.errors import CompileError
from stepgraph.fingerprint import has_data
from stepgraph.weight_kinds import PLAIN, kind_of

# Of a tensor, or of every tensor that it is made of: address, version.
Mark = tuple[int, ...]
# A class of its own, if it has one: a quantised weight may look like the one that it was made of.
Layout = tuple[str, torch.dtype, torch.device, torch.Size, tuple[int, ...]]
# Where a module keeps parameters, buffers and submodules.
CHILDREN = "_modules"
STORES = ("_parameters", "_buffers", CHILDREN)
# The number of what is in no module.
OUTSIDE = -1
GROWN = "the model has parameters or buffers that it did not have when it was compiled; compile it again"
WHAT = ("class", "dtype", "device", "shape", "strides")
_attributes_of = attrgetter("__dict__")


@dataclass(frozen=True)
class Look:
    """What one look at the weights found.

    Attributes:
        replaced: Old tensor -> the new object of its name.
        moved: Whether a tensor lies elsewhere.
        written: Names of tensors that hold other values than at the last look.
        marked: Names of those that were written to, or lie elsewhere: they may have held others in the meantime.
        unseen: Whether values changed that no version told of.
        later: The digests of all tensors, still being computed on an accelerator; `BoundWeights.finish` compares them.
    """

    replaced: Sequence[tuple[Tensor, Tensor]] = ()
    moved: bool = False
    written: tuple[str, ...] = ()
    marked: tuple[str, ...] = ()
    unseen: bool = False
    later: Tensor | None = None


class BoundWeights:
    """A model's parameters and buffers as they were at the last look.

    Args:
        model: The model; its tensors are held until they are replaced.
        compiled: Digests of the values that the plan was compiled with, where these are not the model's own.

    Attributes:
        later: Whether contents are digested on the device in the course of a run, and compared at its end; else looked at when
            it begins: some values of every tensor, and all bits where something changed.
        changes: How often an address or a value has changed; what is computed of the weights and kept notes it.
        moves: How often an address has: captured graphs note it.
        packed: What `packings` said when the weights were last followed.
        modules: The model's modules, by path.
        base: The names that the first of the tensors have in the model without adapters; those that adapters brought follow.
        adapters: Names of the tensors whose values adapters have brought or changed.
    """

    def __init__(self, model: nn.Module, compiled: Sequence[int] | None = None) -> None:
        self.lock = threading.RLock()
        self.changes = self.moves = self.packed = 0
        self.warned = False
        self.modules = dict(model.named_modules())
        self._attributes = list(map(vars, self.modules.values()))
        self._held: dict[str, Tensor | None] = {}
        # In which module's dicts a tensor stands, in which of them, under which name; its path.
        self._places: list[tuple[int, str, str, str]] = [
            (number, kind, name, f"{path}.{name}" if path else name)
            for number, path in enumerate(self.modules)
            for kind in STORES[:2]
            for name in self._attributes[number][kind]
        ]
        # Digests depend on what lies before: of a model with adapters and without, those of its base are the same.
        base = base_names(model, [place[-1] for place in self._places])
        self._places.sort(key=lambda place: place[-1] not in base)
        self.adapters = changed_by_adapters(model)
        present = [self._attributes[number][kind][name] is not None for number, kind, name, _ in self._places]
        self._absent = list(compress(self._places, map(not_, present)))
        self._places = list(compress(self._places, present))
        self._counts = [len(attributes[kind]) for kind in STORES for attributes in self._attributes]
        self._children = [list(attributes[CHILDREN].values()) for attributes in self._attributes]
        self._below = list(chain.from_iterable(self._children))
        self._sizes = list(filter(None, self._counts))
        self._bind()
        held = self._in_places()
        first: dict[int, int] = {}
        # Which of the names' places are the first of their tensor.
        self._first = [place for place, tensor in enumerate(held) if first.setdefault(id(tensor), place) == place]
        self._same = [first[id(tensor)] for tensor in held]
        # What stood for the modules when they were last compared with those here.
        self._tree: object = None
        self.names = tuple(self._places[place][-1] for place in self._first)
        self.base = tuple(base[name] for name in self.names if name in base)
        self.tensors: list[Tensor] = [tensor for place in self._first if (tensor := held[place]) is not None]
        self.filled = all(map(has_data, self.tensors))
        self.later = any(tensor.device.type != "cpu" for tensor in self.tensors)
        self._stand()
        self._take_stock()
        known = () if compiled is None else tuple(compiled)[: len(self._sums)]
        self.compiled = (*known, *self._sums[len(known) :])

    def _stand(self) -> None:
        """Note which tensor each place has."""
        of_first = dict(zip(self._first, self.tensors, strict=True))
        self._standing = [of_first[place] for place in self._same]

    def _take_stock(self) -> None:
        """Take down what the tensors are."""
        self._layouts = [_layout(tensor) for tensor in self.tensors]
        self._marks = [_mark(tensor) for tensor in self.tensors]
        self._scattered = Scattered(self.tensors) if self.filled and not self.later else None
        self._sums: list[int] = content_sums(self.tensors).tolist() if self.filled else [0] * len(self.tensors)

    @property
    def held(self) -> list[Tensor]:
        """The tensors that `add` was told of."""
        return self.tensors[len(self.tensors) - len(self._held) :]

    def new_among(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those of some tensors that are not watched yet, and can be: they lie where the weights lie."""
        known, device = {id(tensor) for tensor in self.tensors}, self.tensors[0].device
        return [tensor for tensor in tensors if id(tensor) not in known and tensor.device == device] if self.filled else []

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Watch tensors that the forward reads beside parameters and buffers, too; right after a look at everything."""
        with self.lock:
            for tensor in tensors:
                name = f"a tensor {list(tensor.shape)} outside parameters and buffers ({len(self._held)})"
                self._held[name] = tensor
                self._same.append(len(self._places))
                self._first.append(len(self._places))
                self._places.append((OUTSIDE, "", name, name))
                self.names += (name,)
                self.tensors.append(tensor)
            self._bind()
            self._stand()
            self._take_stock()
            self.compiled += tuple(self._sums[len(self.compiled) :])

    def stands(self, model: nn.Module, tree: object = None) -> bool:
        """Whether a model is made of the very modules that it was.

        Args:
            model: The model.
            tree: See `look`.
        """
        if tree is not None and tree is self._tree:
            return True
        modules = dict(model.named_modules())
        return modules.keys() == self.modules.keys() and all(map(is_, modules.values(), self.modules.values()))

    def differing(self, others: "BoundWeights") -> list[Tensor]:
        """The tensors that need not hold what those of the same names in another held when it last looked."""
        if self.base != others.base:
            return self.tensors
        pairs = zip(self.tensors[: len(self.base)], self._sums, others._sums, strict=False)
        return [*(tensor for tensor, one, other in pairs if one != other), *self.tensors[len(self.base) :]]

    @property
    def others(self) -> list[str]:
        """Names of the tensors that held other values when the plan was compiled, as far as the last look found."""
        return [name for name, now, then in zip(self.names, self._sums, self.compiled, strict=True) if now != then]

    def named(self, names: Sequence[str]) -> list[Tensor]:
        """Some of the tensors."""
        wanted = set(names)
        return [tensor for name, tensor in zip(self.names, self.tensors, strict=True) if name in wanted]

    def look(self, everything: bool = False, tree: object = None) -> Look:
        """Find out what has changed since the last look.

        Args:
            everything: Read all bits of all tensors, and wait for that.
            tree: Where the model's modules were compared just before, what stands for them (`FactsWatch.tree`).

        Raises:
            CompileError: A parameter or buffer is gone, or new; or one is of another class, dtype, device, shape or strides.
        """
        with self.lock:
            present = self.present(tree)
            refuse_other_layouts(self.names, [_layout(tensor) for tensor in present], self._layouts)
            if not self.filled:
                return Look(self._replaced(present))
            marks = [_mark(tensor) for tensor in present]
            replaced = self._replaced(present)
            moved = any(now[::2] != then[::2] for now, then in zip(marks, self._marks, strict=True))
            pairs = zip(self.names, marks, self._marks, strict=True)
            marked = tuple(name for name, now, then in pairs if now != then) if marks != self._marks else ()
            if replaced or moved:
                self.moves += 1
            self.changes += bool(marked or replaced)
            self.tensors, before, self._marks = present, self._marks, marks
            if replaced:
                self._stand()
            if self.later and not (marked or everything):
                return Look(replaced, moved, marked=marked, later=content_sums(present))
            seen = self._scattered.look(present) if self._scattered is not None else []
            if not (marked or seen or everything):
                return Look(replaced, moved)
            written = self._take_sums(content_sums(present))
            unseen = [number for number in written if before[number] == marks[number]]
            self.changes += bool(unseen)
            return Look(replaced, moved, tuple(self.names[number] for number in written), marked, bool(unseen))

    def displaced(self, tree: object = None) -> tuple[str, ...]:
        """Names of the tensors that are other objects now than at the last look, or lie elsewhere.

        Args:
            tree: See `look`.

        Raises:
            CompileError: See `look`.
        """
        with self.lock:
            together = zip(self.names, self.present(tree), self.tensors, self._marks, strict=True)
            return tuple(name for name, now, then, mark in together if now is not then or _mark(now)[::2] != mark[::2])

    def finish(self, look: Look) -> Look:
        """The end of a run that began with a look: wait for the digests, if it left any, and say what they found."""
        if look.later is None:
            return Look()
        with self.lock:
            written = self._take_sums(look.later)
            # What a version told of was followed when the run began; it does no harm to follow it again.
            self.changes += bool(written)
            return Look(written=tuple(self.names[number] for number in written), unseen=bool(written))

    def _take_sums(self, sums: Tensor) -> list[int]:
        """Take over the digests of the tensors, and say which have others than before, by number."""
        now: list[int] = sums.tolist()
        written = [number for number, (one, other) in enumerate(zip(now, self._sums, strict=True)) if one != other]
        self._sums = now
        return written

    def present(self, tree: object = None) -> list[Tensor]:
        """The tensors that stand in the model's places now, each once."""
        if tree is None or tree is not self._tree:
            self._compare_modules()
            self._tree = tree
        if any(map(is_not, map(dict.get, *self._nowhere), repeat(None))):
            raise CompileError(GROWN)
        held = self._in_places()
        if all(map(is_, held, self._standing)):
            return self.tensors
        if not all(map(is_, held, map(held.__getitem__, self._same))) or any(map(is_, held, repeat(None))):
            self._refuse_other_tensors(held)
        return [held[place] for place in self._first]  # type: ignore[misc]  # none is None here

    def _compare_modules(self) -> None:
        """See that the model is made of the modules that it was, with as many tensors in them."""
        self._follow_stores()
        if any(self._empty) or list(map(len, self._filled)) != self._sizes or not all(map(is_, self._now_below(), self._below)):
            self._refuse_other_contents()

    def _follow_stores(self) -> None:
        """See which dicts modules keep tensors and submodules in: those may be replaced, too.

        Raises:
            CompileError: All attributes of a module were.
        """
        if not all(map(is_, map(_attributes_of, self.modules.values()), self._attributes)):
            together = zip(self.modules.items(), self._attributes, strict=True)
            path = next(path for (path, module), attributes in together if vars(module) is not attributes)
            raise CompileError(
                f"all attributes of {path or 'the model'!r} were replaced (its __dict__); compile the model again"
            )
        for kind, stores in zip(STORES, self._stores, strict=True):
            if not all(map(is_, map(getitem, self._attributes, repeat(kind)), stores)):
                self._bind()
                return

    def _bind(self) -> None:
        """Note the dicts that modules have now."""
        self._stores = [list(map(getitem, self._attributes, repeat(kind))) for kind in STORES]
        every = list(chain(*self._stores))
        self._filled = list(compress(every, self._counts))
        self._empty = list(compress(every, map(not_, self._counts)))
        self._parents = list(compress(self._stores[-1], self._children))

        def located(places: Sequence[tuple[int, str, str, str]]) -> tuple[list[dict[str, Any]], list[str]]:
            spaces = [self._held if number == OUTSIDE else self._attributes[number][kind] for number, kind, *_ in places]
            return spaces, [name for _, _, name, _ in places]

        self._where, self._nowhere = located(self._places), located(self._absent)

    def _in_places(self) -> list[Tensor | None]:
        return list(map(dict.get, *self._where))

    def _now_below(self) -> Iterator[nn.Module | None]:
        return chain.from_iterable(map(dict.values, self._parents))

    def _refuse_other_contents(self) -> None:
        """Say which submodules are others; else there are more or less tensors."""
        for path, children, before in zip(self.modules, self._stores[-1], self._children, strict=True):
            if len(children) == len(before) and all(map(is_, children.values(), before)):
                continue
            name = next((name for name, child in children.items() if all(child is not one for one in before)), "")
            raise CompileError(
                f"the model is made of other parts than when it was compiled, such as {'.'.join(filter(None, (path, name)))!r} "
                f"(modules that were exchanged, or left out?); put them back, or detach, and compile again"
            )
        raise CompileError(GROWN)

    def _refuse_other_tensors(self, held: Sequence[Tensor | None]) -> None:
        """Say which tensor is gone, or tied no longer."""
        for place, tensor in enumerate(held):
            if tensor is None:
                raise CompileError(f"{self._places[place][-1]} is no longer there; put it back, or compile the model again")
            if tensor is not held[self._same[place]]:
                names = f"{self._places[place][-1]} and {self._places[self._same[place]][-1]}"
                raise CompileError(f"{names} were one tensor and are two now; tie them again, or compile the model again")

    def _replaced(self, present: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return (
            []
            if present is self.tensors
            else [pair for pair in zip(self.tensors, present, strict=True) if pair[0] is not pair[1]]
        )

    def refuse_other(self, model: "BoundWeights") -> None:
        """See that another model has the same tensors, whatever they hold.

        Raises:
            CompileError: It has not; the message says which differs.
        """
        if self.names != model.names or self._same != model._same:
            names = sorted(set(self.names) ^ set(model.names)) or ["a tensor with two names"]
            raise CompileError(f"the other model has other parameters or buffers, such as {names[0]!r}; compile a plan for it")
        refuse_other_layouts(self.names, model._layouts, self._layouts)


def refuse_other_layouts(names: Sequence[str], now: Sequence[Layout], then: Sequence[Layout]) -> None:
    """Compare classes, dtypes, devices, shapes and strides with those that were compiled for.

    Raises:
        CompileError: One differs; the message names both and says what to do.
    """
    if now == then:
        return
    for name, one, other in zip(names, now, then, strict=True):
        for what, here, there in zip(WHAT, one, other, strict=True):
            if here != there:
                raise CompileError(
                    f"{name} has the {what} {_shown(here)}; the executable was compiled for {_shown(there)}: bring the model "
                    f"back to that, or compile it again as it is"
                )


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, (tuple, torch.Size)) else str(value).removeprefix("torch.")


def _layout(tensor: Tensor) -> Layout:
    kind = "torch.Tensor" if type(tensor) in PLAIN else kind_of(tensor)
    return kind, tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _mark(tensor: Tensor) -> Mark:
    if type(tensor) not in PLAIN:
        return tuple(part for plain in plain_tensors(tensor) for part in _mark(plain))
    return tensor.data_ptr(), version_of(tensor)


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to; those of inference mode do not count it."""
    return -1 if tensor.is_inference() else tensor._version
