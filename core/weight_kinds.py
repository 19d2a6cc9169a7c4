"""Weights that are no plain tensors: quantised ones, which are a class of their own, or bytes with their kind beside them.

Such a weight means what its class makes of it. It is never copied, faked or taken apart here: the module that holds it is
called as it is, and what is told of it comes from the plain tensors that it is made of.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)
NAMED = (int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, torch.layout, enum.Enum)
# How many objects deep a weight's attributes are looked at (bitsandbytes keeps its scales two objects away).
DEEP = 4


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what its numbers say, and no class of its own."""
    return type(tensor) in PLAIN


def kind_of(tensor: torch.Tensor) -> str:
    """A tensor's class, by the name it is imported by."""
    return f"{type(tensor).__module__}.{type(tensor).__qualname__}"


def own_kinds(module: nn.Module, recurse: bool = True) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a module that are no plain tensors, by name."""
    tensors = (*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse))
    return {name: tensor for name, tensor in tensors if not is_plain(tensor)}


def inner_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors that a weight is made of, by name: itself where it is plain.

    A wrapper says what it wraps (`__tensor_flatten__`); others are their own bytes, and the tensors among their attributes.
    """
    if is_plain(tensor):
        return {"": tensor}
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        parts = {name: getattr(tensor, name) for name in flatten()[0]}
    else:
        parts = _tensors_in(_attributes(tensor), DEEP)
        if _has_memory(tensor):
            parts[""] = torch.Tensor._make_subclass(torch.Tensor, tensor, False)
    return {
        ".".join(filter(None, (name, inner))): plain
        for name, part in sorted(parts.items())
        for inner, plain in inner_tensors(part).items()
    }


def describe_kind(tensor: torch.Tensor) -> str:
    """What a weight is beside the numbers in its inner tensors: its class and its plain attributes."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    about = flatten()[1] if flatten is not None else _attributes(tensor)
    return f"{kind_of(tensor)} {_told(about, DEEP)}"


def weight_bytes(tensor: torch.Tensor) -> int:
    """What a weight takes in memory."""
    return sum(part.nbytes for part in inner_tensors(tensor).values())


def _attributes(tensor: torch.Tensor) -> dict[str, Any]:
    return {name: value for name, value in vars(tensor).items() if not name.startswith("_")}


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor has bytes of its own; a wrapper has none."""
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return tensor.numel() == 0 or tensor.is_meta or tensor.data_ptr() != 0
        except RuntimeError:
            return False


def _members(value: Any) -> dict[str, Any]:
    """What an attribute consists of, by name; nothing for what has no parts, or leads elsewhere."""
    if isinstance(value, Mapping):
        return {str(key): entry for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return {str(index): entry for index, entry in enumerate(value)}
    if isinstance(value, (*NAMED, type, nn.Module, torch.Tensor, torch.device)) or callable(value):
        return {}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(getattr(value, "__dict__", {}))


def _tensors_in(value: Any, depth: int) -> dict[str, torch.Tensor]:
    """The tensors among the parts of something, by path."""
    found: dict[str, torch.Tensor] = {}
    for name, member in _members(value).items():
        if isinstance(member, torch.Tensor):
            found[name] = member
        elif depth:
            found |= {f"{name}.{inner}": tensor for inner, tensor in _tensors_in(member, depth - 1).items()}
    return found


def _told(value: Any, depth: int) -> str:
    """The same text for the same plain values, in every process and on every device."""
    if isinstance(value, NAMED):
        return str(value) if isinstance(value, enum.Enum) else repr(value)
    members = _members(value) if depth else {}
    parts = ", ".join(f"{name}: {_told(member, depth - 1)}" for name, member in sorted(members.items()))
    return f"{type(value).__qualname__}({parts})"


__all__ = ["describe_kind", "inner_tensors", "is_plain", "kind_of", "own_kinds", "weight_bytes"]
