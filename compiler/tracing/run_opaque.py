"""Modules whose weights are no plain tensors: one call each, of the module as it is, never cut into its parts."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stepgraph.errors import TraceError
from stepgraph.fingerprint import has_data
from stepgraph.weight_kinds import is_plain, kind_of, own_kinds


def opaque_modules(model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> frozenset[int]:
    """Ids of the modules that are called as they are: they hold a weight of a class of its own and no other modules."""
    modules = {
        id(module)
        for module in model.modules()
        if module is not model and (is_leaf(module) or not module._modules) and own_kinds(module)
    }
    return frozenset(modules)


def run_opaque(module: nn.Module, path: str, args: Any, kwargs: Any) -> tuple[Any, int]:
    """Call a module with zeros, to see what it returns; (result, multiply-accumulates).

    Raises:
        TraceError: Its weights have no data, or it does something that a graph's node cannot do; the message names their class.
    """
    kinds = own_kinds(module)
    what = f"{path}, whose {next(iter(kinds))} is a {kind_of(next(iter(kinds.values())))},"
    if not all(has_data(tensor) for tensor in chain(module.parameters(), module.buffers())):
        raise TraceError(
            f"{what} has no data; what such a weight does is known from calling it, so trace the model with its weights"
        )
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    attributes, before, weights = {**vars(module)}, _state(module), _weights(module)
    versions = [tensor._version for tensor in inputs]
    try:
        output = module(*args, **kwargs)
        after = _state(module)
        if after != before:
            # What a first call sets once and for all (bitsandbytes' compute dtype) the model's own first call sets again.
            output = module(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, ImportError, AssertionError) as error:
        raise TraceError(
            f"{what} cannot be called on {inputs[0].device if inputs else 'this device'} ({type(error).__name__}: {error}); "
            f"move the model to a device that has its kernels, or quantise it otherwise"
        ) from error
    changed = _state(module) != after or _weights(module) != weights
    vars(module).clear()
    vars(module).update(attributes)
    if changed:
        raise TraceError(f"{what} changes itself in every call; a later call would depend on an earlier one")
    outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    odd = next((tensor for tensor in outputs if not is_plain(tensor)), None)
    if odd is not None:
        raise TraceError(f"{what} returns a {kind_of(odd)}, which is no plain tensor")
    places = {tensor.untyped_storage()._cdata for tensor in inputs}
    if versions != [tensor._version for tensor in inputs] or any(out.untyped_storage()._cdata in places for out in outputs):
        raise TraceError(f"{what} writes to what it is called with, or returns it; a node of a graph returns new memory")
    return output, _macs(module, inputs)


def _state(module: nn.Module) -> dict[str, Any]:
    """What a module holds: plain values as they are, others by identity."""
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else id(value) for name, value in vars(module).items()}


def _weights(module: nn.Module) -> list[tuple[int, int | None]]:
    """Its tensors by identity, and how often they have been written to."""
    tensors = chain(module.parameters(), module.buffers())
    return [(id(tensor), None if tensor.is_inference() else tensor._version) for tensor in tensors]


def _macs(module: nn.Module, inputs: list[torch.Tensor]) -> int:
    """Of a linear map, whatever its weight is kept as; nothing is known of others."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if not inputs or not all(isinstance(size, int) for size in sizes):
        return 0
    return inputs[0].numel() * int(sizes[1])  # type: ignore[arg-type]
