"""A forward's keyword arguments as the inputs of a graph, which are tensors by name."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from stepgraph.checks import shown
from stepgraph.errors import ArgumentError, CompileError

T = TypeVar("T")


def latents_key(inputs: Mapping[str, Any]) -> str:
    """What a forward calls its latents, which come first of its inputs."""
    return next(iter(inputs))


def latents_of(inputs: Mapping[str, T]) -> T:
    """The latents among a forward's inputs, or what stands there for them, such as their shape."""
    return inputs[latents_key(inputs)]


def flat_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with what lies inside dicts of tensors beside the others.

    PixArt takes `added_cond_kwargs={"resolution": ..., "aspect_ratio": ...}`; flat these are `added_cond_kwargs__resolution`
    and `added_cond_kwargs__aspect_ratio`. Dicts without tensors stay as they are, as does everything else: flattening twice
    is flattening once.

    Raises:
        CompileError: Two arguments have the same flat name.
    """
    flat: dict[str, Any] = {}
    for name, value in inputs.items():
        held = holds_tensors(value)
        for key, entry in ((f"{name}__{key}", entry) for key, entry in value.items()) if held else ((name, value),):
            if key in flat:
                raise CompileError(f"two inputs are named {key}: one inside the dict {name}, one beside it; rename one of them")
            flat[key] = entry
    return flat


def refuse_odd_tensors(inputs: Mapping[str, Any]) -> None:
    """Refuse tensors that are not laid out as graphs take them, and timesteps that are no real numbers.

    Raises:
        ArgumentError: The message names one.
    """
    timestep = inputs.get("timestep")
    if isinstance(timestep, complex) or (isinstance(timestep, torch.Tensor) and timestep.is_complex()):
        raise ArgumentError(f"timestep is {shown(timestep)}; expected real numbers, as the scheduler has them")
    for name, value in flat_inputs(inputs).items():
        if isinstance(value, torch.Tensor) and value.layout != torch.strided:
            layout = str(value.layout).removeprefix("torch.")
            raise ArgumentError(f"{name} is {shown(value)} laid out as {layout}; expected a dense one: pass {name}.to_dense()")


def like_flat(inputs: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments in which everything that `flat` names has its value there, inside dicts of tensors too."""
    return {
        name: {key: flat.get(f"{name}__{key}", entry) for key, entry in value.items()}
        if holds_tensors(value)
        else flat.get(name, value)
        for name, value in inputs.items()
    }


def holds_tensors(value: Any) -> bool:
    """Whether an argument is a dict, by names, of which an entry is a tensor."""
    return (
        isinstance(value, dict)
        and all(isinstance(key, str) and key.isidentifier() for key in value)
        and any(isinstance(entry, torch.Tensor) for entry in value.values())
    )
