"""Results of operations that a trace has seen: an operation on values of the same shapes, dtypes and strides is not run again.

A transformer does the same some dozens of times, block by block, and running an operation on fake values takes longer than all
else of its tracing.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

# What stands for itself in a key.
VALUES = (int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout)

Result = tuple[Any, frozenset[int], int]


@dataclass
class KnownResults:
    """Results by operation and the facts of its arguments; only of operations whose results are tensors in memory of their own.

    Attributes:
        like: Makes a fake tensor without history that has another's size, strides, dtype and device.
    """

    like: Callable[[torch.Tensor], FakeTensor]
    _results: dict[Hashable, tuple[Any, int]] = field(default_factory=dict)

    def key(self, operation: Hashable | None, args: Any, kwargs: Any) -> Hashable | None:
        """What the result depends on; None where that cannot be said."""
        facts = _facts((args, kwargs))
        # Whole numbers times a fraction are of the default dtype.
        return None if operation is None or facts is None else (operation, torch.get_default_dtype(), facts)

    def find(self, key: Hashable | None) -> Result | None:
        """The result, as new tensors; None where it is not known."""
        result = self._results.get(key)
        if result is None:
            return None
        value, macs = result
        fresh = self.like(value) if isinstance(value, torch.Tensor) else type(value)(map(self.like, value))
        return fresh, frozenset(), macs

    def keep(self, key: Hashable | None, result: Result, arguments: list[FakeTensor]) -> None:
        """Remember a result, if it is no view of an argument and nothing was written to."""
        value, mutates, macs = result
        tensors = [value] if isinstance(value, torch.Tensor) else value if type(value) in (tuple, list) else []
        if key is None or mutates or not tensors or not all(isinstance(tensor, FakeTensor) for tensor in tensors):
            return
        storages = [tensor.untyped_storage()._cdata for tensor in (*arguments, *tensors)]
        if len(set(storages[-len(tensors) :]) - set(storages[: len(arguments)])) == len(tensors):
            self._results[key] = value, macs


def leaf_operation(module: nn.Module) -> Hashable | None:
    """What a leaf module computes, beside its parameters; None where its own description may not say all of it."""
    attributes = vars(module)
    plain = all(isinstance(value, (*VALUES, torch.Size, tuple)) for name, value in attributes.items() if name[0] != "_")
    if module._modules or "forward" in attributes or module._forward_hooks or module._forward_pre_hooks or not plain:
        return None
    return type(module), tuple((name, repr(value)) for name, value in attributes.items() if name[0] != "_")


def _facts(value: Any) -> Hashable | None:
    if isinstance(value, FakeTensor):
        return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device
    # A number's kind decides a result's dtype, and True equals 1.
    if isinstance(value, VALUES):
        return type(value), value
    if isinstance(value, slice):
        return _facts((value.start, value.stop, value.step))
    if isinstance(value, dict):
        value = tuple(value.items())
    if not isinstance(value, (tuple, list)):
        return None
    parts = tuple(map(_facts, value))
    return None if None in parts else (type(value), parts)
