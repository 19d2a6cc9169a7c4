"""Arguments of an operation as a call gives them: of what kind they are, where they lie, and channels side by side."""

import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor

# The environment that choices depend on: what is set there is read at every call.
SETTINGS = ("STEPGRAPH_PROVIDERS", "TRITON_INTERPRET")
# Mapped over lists of tensors, they take no Python.
_facts, _strides = attrgetter("shape", "dtype", "device"), Tensor.stride


def kind_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable | None:
    """All that a choice depends on; None for arguments of which that cannot be told, such as sparse tensors."""
    environment = os.environ
    try:
        return (*[environment.get(name) for name in SETTINGS], *map(_kind, args), *kwargs, *map(_kind, kwargs.values()))
    except (RuntimeError, AttributeError, TypeError):
        return None


def _kind(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return (type(value), *map(type, value), *map(_facts, value), *map(_strides, value))
    return type(value), value


def device_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Kind of the device of the first tensor."""
    for value in (*args, *kwargs.values()):
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, Tensor):
            return first.device.type
    return "cpu"


def _side_by_side(value: Tensor) -> bool:
    return not value.ndim or value.stride(-1) == 1 or value.shape[-1] == 1


def _all_contiguous(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_contiguous():
                return False
        elif isinstance(value, (list, tuple)) and not all(map(Tensor.is_contiguous, value)):
            return False
    return True


def by_rows(run: Callable[..., Any]) -> Callable[..., Any]:
    """A provider (or its `declines`) that gets every tensor with its channels side by side.

    The strides at run time can be others than those the provider was chosen for: operations in between may be free to choose.
    """

    def laid_out(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if _side_by_side(value) else value.contiguous()
        return [laid_out(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    def called(*args: Any, **kwargs: Any) -> Any:
        # Nearly always there is nothing to do, and calls of operations are short.
        if _all_contiguous(args) and (not kwargs or _all_contiguous(kwargs.values())):
            return run(*args, **kwargs)
        return run(*map(laid_out, args), **{name: laid_out(value) for name, value in kwargs.items()})

    return called
