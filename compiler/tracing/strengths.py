"""Strengths: floats that a forward multiplies tensors with, which become inputs of its graph.

While a forward is traced, a float that it reads of one of its modules is a `StrengthValue`, which knows where it was read. Its
product with a tensor is recorded with a constant that can be written to; whatever else is done with it is done with the plain
number, and then the graph holds for this number only. It is none of C's floats, so that C code (`math.isclose`, "%.1f" % it)
has to ask for the number, which is seen; torch takes it for one of its symbolic floats. Whether it is a float may be asked:
then it has to stay one. What is not seen is `type(number)`. Where C code takes nothing but a float of its own, the forward
fails, and is traced again with plain numbers.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from stepgraph.adapters import is_tuner

# Whose products with a Python number are those with a tensor [] of float64, bit for bit, and whose are made in float32.
WHOLES = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply")
# What the names of the constants begin with.
STRENGTH = "_strength"
# (path of the module, attribute, key in a dict or none)
Place = tuple[str, str, tuple[Any, ...]]


@dataclass(eq=False)
class Strengths:
    """The strengths of one trace.

    Attributes:
        denied: Those that are plain numbers here; None where all are.
        other: Those that have another number than the model's, to see what becomes of it.
        places: What was handed out.
        tensors: Those of them that are tensors [], as peft's hot-swapping makes them of a tuner layer's.
        got: Those of them in dicts that the forward has asked for.
        halves: Which dtypes of half precision a strength's products have, by place.
        fixed: What something else than a product was done with.
        asked: What was asked for its class.
        constants: What the graph reads in its place, by device.
    """

    denied: frozenset[Place] | None = frozenset()
    other: frozenset[Place] = frozenset()
    places: dict[Place, float] = field(default_factory=dict)
    tensors: set[Place] = field(default_factory=set)
    got: set[Place] = field(default_factory=set)
    halves: dict[Place, torch.dtype] = field(default_factory=dict)
    fixed: set[Place] = field(default_factory=set)
    asked: set[Place] = field(default_factory=set)
    constants: dict[tuple[Place, torch.device], torch.Tensor] = field(default_factory=dict)
    _dicts: dict[tuple[str, str], "StrengthDict"] = field(default_factory=dict)

    @property
    def unread(self) -> frozenset[Place]:
        """Entries of dicts that the forward has not asked for."""
        return frozenset(place for place in self.places if place[2] and place not in self.got)

    def read(self, path: str, name: str, value: Any, kind: type = nn.Module) -> Any:
        """What the forward gets for an attribute: strengths for floats, also in a plain dict; the value otherwise.

        Args:
            path: The module's.
            name: The attribute's.
            value: The attribute.
            kind: The module's class; a tuner layer's `scaling` can hold tensors in the place of floats.
        """
        if type(value) is float:
            return self.wrapped((path, name, ()), value)
        if type(value) is dict and any(type(v) is float or _is_scaling(kind, name, v) for v in value.values()):
            if (path, name) not in self._dicts or self._dicts[path, name].real is not value:
                with unset_fake_temporarily(), torch._C.DisableTorchFunction():
                    numbers = {key: v.item() for key, v in value.items() if _is_scaling(kind, name, v)}
                self.tensors |= {(path, name, (key,)) for key in numbers}
                self._dicts[path, name] = StrengthDict(self, path, name, value, numbers)
            return self._dicts[path, name]
        return value

    def wrapped(self, place: Place, value: float) -> "StrengthValue | float":
        """A strength, unless it may be none."""
        if self.denied is None or place in self.denied or not math.isfinite(value):
            return value
        if self.places.setdefault(place, value) != value:
            # The forward itself has set it.
            self.fixed.add(place)
            return value
        # Odd numbers: round ones could lead to the same place by chance.
        other = value * 1.2345678 + math.copysign(0.1376543, value)
        return StrengthValue(other if place in self.other else value, place, self, value)

    def constant(self, strength: "StrengthValue", device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The tensor [] that the graph reads in a strength's place, in a product with a tensor of a dtype."""
        key = strength.place, device
        if self.halves.setdefault(strength.place, dtype) != dtype and strength.place in self.tensors:
            self.fixed.add(strength.place)
        if key not in self.constants:
            with unset_fake_temporarily(), torch._C.DisableTorchFunction():
                self.constants[key] = torch.full((), strength.plain, dtype=torch.float64, device=device)
        return self.constants[key]


def _is_scaling(kind: type, name: str, value: Any) -> bool:
    """Whether a value is a strength that peft's hot-swapping has made a tensor of, to write to it in place."""
    tensor = name == "scaling" and type(value) is torch.Tensor and is_tuner(kind)
    return tensor and value.ndim == 0 and not value.is_meta


def factors(func: Any, args: Any, kwargs: Any) -> tuple[torch.Tensor, "StrengthValue"] | None:
    """Tensor and strength of a product that the graph can follow the strength in; None for any other operation."""
    product = getattr(func, "__name__", "") in PRODUCTS and (
        func in (torch.mul, torch.multiply) or torch.overrides.is_tensor_method_or_property(func)
    )
    if not product or kwargs or len(args) != 2:
        return None
    tensor, strength = args if isinstance(args[0], torch.Tensor) else (args[1], args[0])
    if not isinstance(tensor, torch.Tensor) or type(strength) is not StrengthValue:
        return None
    # Of two tensors without dimensions, the one with the larger dtype would decide.
    return (tensor, strength) if tensor.ndim and tensor.dtype in (*WHOLES, *HALVES) else None


class StrengthValue(torch.SymFloat):
    """A number that knows where it was read, and tells who asks for it. See the module.

    Args:
        value: The number.
        place: Where it was read.
        owner: The strengths of the trace.
        original: What stands there.
    """

    def __init__(self, value: float, place: Place, owner: Strengths, original: float) -> None:
        self.plain, self.place, self.owner, self.original = value, place, owner, original

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """A float, to those who ask; torch asks of every argument."""
        frame = sys._getframe(1)
        if not str(frame.f_globals.get("__name__")).startswith("stepgraph.") and ASKING & {*frame.f_code.co_names}:
            self.owner.asked.add(self.place)
        return float

    def decay(self) -> float:
        """The number, for something that the graph cannot follow it in."""
        self.owner.fixed.add(self.place)
        return self.plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is a plain number."""
        return float, (self.decay(),)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """As numpy has it."""
        return np.asarray(self.decay(), *args)


# Names in the code of whoever asks whether a number is a float.
ASKING = frozenset({"isinstance", "issubclass", "__class__", "_abc_instancecheck", "_abc_subclasscheck", "float", "int"})


def _decaying(name: str) -> Callable[..., Any]:
    method = getattr(float, name)

    def decayed(self: StrengthValue, *others: Any) -> Any:
        # A tensor's own method goes on, and meets the strength among its arguments.
        if any(isinstance(other, torch.Tensor) for other in others):
            return NotImplemented
        return method(self.decay(), *(other.decay() if type(other) is StrengthValue else other for other in others))

    return decayed


# What every object has, or needs in order to be one.
ORDINARY = {
    "__class__", "__new__", "__init__", "__getattribute__", "__setattr__", "__delattr__", "__dir__", "__doc__", "__sizeof__",
    "__init_subclass__", "__subclasshook__", "__getformat__", "__getstate__", "__reduce__", "__reduce_ex__",
}  # fmt: skip
for _name in {*dir(float)} - ORDINARY:
    if callable(getattr(float, _name)):
        setattr(StrengthValue, _name, _decaying(_name))
for _name in ("real", "imag"):
    setattr(StrengthValue, _name, property(lambda self, name=_name: getattr(self.decay(), name)))  # type: ignore[misc]


def restored(value: Any) -> Any:
    """What the forward read as a strength, or as a dict of them, as it stands in the model; anything else as it is."""
    if type(value) is StrengthValue:
        value.owner.fixed.add(value.place)
        return value.original
    if isinstance(value, dict):
        return {key: restored(entry) for key, entry in value.items()}
    return value


def restore(model: nn.Module) -> None:
    """Take strengths out of a model that its forward put there, as one does that sets a number for a time."""
    for module in model.modules():
        attributes = vars(module)
        for name in [name for name, value in attributes.items() if type(value) in (StrengthValue, StrengthDict)]:
            value = attributes[name]
            attributes[name] = value.real if isinstance(value, StrengthDict) else restored(value)


class StrengthDict(dict[Any, Any]):
    """A dict whose floats are strengths; what is written to it is written to the real one."""

    def __init__(self, owner: Strengths, path: str, name: str, real: dict[Any, Any], numbers: dict[Any, float]) -> None:
        self.real, self._got = real, owner.got
        floats = {key: value for key, value in real.items() if type(value) is float} | numbers
        super().__init__(real | {key: owner.wrapped((path, name, (key,)), value) for key, value in floats.items()})
        # Where strengths are not followed, the forward gets what stands there.
        super().update({key: real[key] for key in numbers if not isinstance(super(StrengthDict, self).get(key), StrengthValue)})
        self._place = path, name

    def __copy__(self) -> dict[Any, Any]:
        """A plain dict; its floats are strengths."""
        self.note_all()
        return dict(self)

    def note_all(self) -> None:
        """Take down that every entry was asked for."""
        self._got |= {(*self._place, (key,)) for key in self}

    def __getitem__(self, key: Any) -> Any:
        """An entry, which is taken down as asked for."""
        self._got.add((*self._place, (key,)))
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """An entry, which is taken down as asked for."""
        self._got.add((*self._place, (key,)))
        return super().get(key, default)


def _reading(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def read(self: StrengthDict, *args: Any) -> Any:
        self.note_all()
        return method(self, *args)

    return read


for _name in ("items", "values", "copy", "__eq__", "__ne__", "__or__", "__ror__"):
    setattr(StrengthDict, _name, _reading(_name))


def _writing(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def write(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.note_all()
        method(self.real, *map(restored, args), **{key: restored(value) for key, value in kwargs.items()})
        return method(self, *args, **kwargs)

    return write


def write_through(kind: type) -> None:
    """Let a dict that stands for another, its `real` one, write to that as well."""
    for name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
        setattr(kind, name, _writing(name))


write_through(StrengthDict)
