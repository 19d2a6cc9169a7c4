"""Strengths: floats that a forward multiplies tensors with, which become inputs of its graph.

While a forward is traced, a float that it reads of one of its modules is a `StrengthValue`, which knows where it was read. Its
product with a tensor is recorded with a constant that can be written to; whatever else is done with it is done with the plain
number, and then the graph holds for this number only. What C code does with it is not seen (`math.sqrt`): a second trace has
other numbers in their place, and where that makes other graphs they are not followed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
        constants: What the graph reads in its place, by device.
    """

    denied: frozenset[Place] | None = frozenset()
    other: frozenset[Place] = frozenset()
    places: dict[Place, float] = field(default_factory=dict)
    tensors: set[Place] = field(default_factory=set)
    got: set[Place] = field(default_factory=set)
    halves: dict[Place, torch.dtype] = field(default_factory=dict)
    fixed: set[Place] = field(default_factory=set)
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

    def wrapped(self, place: Place, value: float) -> float:
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
    if not isinstance(tensor, torch.Tensor) or not isinstance(strength, StrengthValue):
        return None
    # Of two tensors without dimensions, the one with the larger dtype would decide.
    return (tensor, strength) if tensor.ndim and tensor.dtype in (*WHOLES, *HALVES) else None


class StrengthValue(float):
    """A float that knows where it was read. See the module."""

    place: Place
    owner: Strengths
    original: float

    def __new__(cls, value: float, place: Place, owner: Strengths, original: float) -> "StrengthValue":
        """A number, with its place and what stands there."""
        strength = super().__new__(cls, value)
        strength.place, strength.owner, strength.original = place, owner, original
        return strength

    @property
    def plain(self) -> float:
        """The number."""
        return float.__pos__(self)

    def decay(self) -> float:
        """The number, for something that the graph cannot follow it in."""
        self.owner.fixed.add(self.place)
        return self.plain

    def __reduce__(self) -> Any:
        """A copy is a plain number."""
        return float, (self.decay(),)


def _decaying(name: str) -> Callable[..., Any]:
    method = getattr(float, name)

    def decayed(self: StrengthValue, *others: Any) -> Any:
        # A tensor's own method goes on, and meets the strength among its arguments.
        if any(isinstance(other, torch.Tensor) for other in others):
            return NotImplemented
        self.owner.fixed.add(self.place)
        return method(self, *(other.decay() if isinstance(other, StrengthValue) else other for other in others))

    return decayed


BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow")
UNARY = ("neg", "pos", "abs", "bool", "int", "float", "trunc", "floor", "ceil", "round", "hash", "repr", "format")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
METHODS = (*BINARY, *(f"r{name}" for name in BINARY), *UNARY, *COMPARISONS)
for _name in METHODS:
    setattr(StrengthValue, f"__{_name}__", _decaying(f"__{_name}__"))
StrengthValue.__str__ = StrengthValue.__repr__  # type: ignore[method-assign]
for _name in ("as_integer_ratio", "is_integer", "hex", "conjugate"):
    setattr(StrengthValue, _name, _decaying(_name))


def restored(value: Any) -> Any:
    """What the forward read as a strength, or as a dict of them, as it stands in the model; anything else as it is."""
    if isinstance(value, StrengthValue):
        value.owner.fixed.add(value.place)
        return value.original
    if isinstance(value, dict):
        return {key: restored(entry) for key, entry in value.items()}
    return value


def restore(model: nn.Module) -> None:
    """Take strengths out of a model that its forward put there, as one does that sets a number for a time."""
    for module in model.modules():
        attributes = vars(module)
        for name in [name for name, value in attributes.items() if isinstance(value, (StrengthValue, StrengthDict))]:
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

    def write(self: StrengthDict, *args: Any, **kwargs: Any) -> Any:
        self.note_all()
        method(self.real, *map(restored, args), **{key: restored(value) for key, value in kwargs.items()})
        return method(self, *args, **kwargs)

    return write


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(StrengthDict, _name, _writing(_name))
