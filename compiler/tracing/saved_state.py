"""What a model held before a trace, so that a refused one leaves it as it was."""

import gc
import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from stepgraph.compiler.tracing.traced_tensor import TracedTensor

# How many containers and objects deep a module's attributes are looked at.
DEEP = 8
ELSEWHERE = {*sys.stdlib_module_names, "torch", "numpy", "stepgraph"} - {"types", "collections"}


class SavedState:
    """The attributes of a model's modules, and the containers and objects in them, each with what it held.

    Beside them stand the globals and classes of the model's code, and the closures of its functions: there only what came to
    hold traced tensors is put back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved: list[tuple[Any, Any, bool]] = []
        self._seen: set[int] = set()
        classes = dict.fromkeys(kind for module in model.modules() for kind in type(module).__mro__)
        for module in model.modules():
            # torch's own modules keep nothing in containers of theirs.
            self._keep(vars(module), 1 if _is_elsewhere(type(module)) else DEEP, owned=True)
        for kind in classes:
            if not _is_elsewhere(kind):
                self._keep_class(kind)

    def restore(self, called: bool = False) -> None:
        """Put everything back; of a forward that was `called` as it is, tensors that it left outside the model too."""
        for holder, before, owned in self._saved:
            if owned or _holds_traced(holder) or (called and _holds_new_tensor(holder, before)):
                _put_back(holder, before)

    def _keep_class(self, kind: type) -> None:
        """A class's own containers, and the globals that its code sees."""
        for value in vars(kind).values():
            self._keep(value, 3, owned=False)
        module = sys.modules.get(kind.__module__)
        if module is not None:
            self._keep(vars(module), 3, owned=False)

    def _keep(self, value: Any, depth: int, owned: bool) -> None:
        """Save what can be changed in a value, and in its members."""
        if id(value) in self._seen or depth == 0 or isinstance(value, (torch.Tensor, nn.Module, str, int, float, type(None))):
            return
        self._seen.add(id(value))
        if isinstance(value, (dict, list, set, deque)):
            self._saved.append((value, value.copy() if not isinstance(value, dict) else dict(value), owned))
        elif isinstance(value, CellType):
            self._saved.append((value, _members(value), False))
            owned = False
        for member in _members(value):
            self._keep(member, depth - 1, owned and not isinstance(value, FunctionType))


def _members(value: Any) -> list[Any]:
    """What a value leads to: members of containers, attributes of objects, closures of functions."""
    if isinstance(value, Mapping):
        return list(dict.values(value)) if isinstance(value, dict) else []
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, CellType):
        try:
            return [value.cell_contents]
        except ValueError:
            return []
    if isinstance(value, FunctionType):
        return [*(value.__closure__ or ()), *(value.__defaults__ or ()), getattr(value, "__wrapped__", None)]
    if isinstance(value, (classmethod, staticmethod)):
        return [value.__func__]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, type) or _is_elsewhere(type(value)):
        return []
    return [getattr(value, "__dict__", None)]


def _is_elsewhere(kind: type) -> bool:
    """Whether a class is one of Python's, torch's or ours, whose objects hold nothing of a model's."""
    return kind.__module__.partition(".")[0] in ELSEWHERE


def _holds_traced(value: Any) -> bool:
    return _leads_to(value, TracedTensor, 4)


def _holds_new_tensor(holder: Any, before: Any) -> bool:
    known = {id(member) for member in _members(before)}
    return any(_leads_to(member, torch.Tensor, 3) for member in _members(holder) if id(member) not in known)


def _leads_to(value: Any, kind: type, depth: int) -> bool:
    """Whether a value is of a kind, or a container in which there is one."""
    if issubclass(type(value), kind):
        return True
    if depth == 0 or isinstance(value, (torch.Tensor, nn.Module)):
        return False
    parts = _members(value) if isinstance(value, (dict, list, tuple, set, deque, CellType)) else ()
    return any(_leads_to(part, kind, depth - 1) for part in parts)


def _put_back(holder: Any, before: Any) -> None:
    """Let a container hold what it held before; only what differs is written."""
    if isinstance(holder, CellType):
        if before:
            holder.cell_contents = before[0]
        else:
            del holder.cell_contents
    elif isinstance(holder, dict):
        # A configuration may refuse to be written to by its own methods.
        kind = OrderedDict if isinstance(holder, OrderedDict) else dict
        for key in [key for key in holder if key not in before]:
            kind.__delitem__(holder, key)
        for key, value in before.items():
            if key not in holder or dict.__getitem__(holder, key) is not value:
                kind.__setitem__(holder, key, value)
    elif len(holder) != len(before) or any(one is not other for one, other in zip(holder, before, strict=True)):
        holder.clear()
        holder.update(before) if isinstance(holder, set) else holder.extend(before)


def drop_traced(made: Iterable["weakref.ref[TracedTensor]"]) -> None:
    """Take traced tensors that are still held out of the dicts, lists, sets and tuples that hold them, wherever these are."""
    left = {id(traced): traced for ref in made if (traced := ref()) is not None}
    if not left:
        return
    holders = [holder for holder in gc.get_referrers(*left.values()) if holder is not left]
    tuples = {id(holder): holder for holder in holders if type(holder) is tuple}
    if tuples:
        holders += [holder for holder in gc.get_referrers(*tuples.values()) if holder is not tuples and holder is not holders]
    gone = {*left, *tuples}
    for holder in holders:
        if isinstance(holder, dict):
            for key in [key for key, value in list(holder.items()) if id(value) in gone]:
                del holder[key]
        elif isinstance(holder, list) and holder is not holders:
            holder[:] = [value for value in holder if id(value) not in gone]
        elif isinstance(holder, set):
            holder -= {value for value in holder if id(value) in gone}


__all__ = ["SavedState", "drop_traced"]
