"""A forward's keyword arguments as the inputs of a graph, which are tensors by name."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from stepgraph.checks import shown
from stepgraph.errors import ArgumentError, CompileError

T = TypeVar("T")

# What diffusers' models call their timestep.
TIMESTEPS = ("timestep", "timesteps", "t")
# The latents of a sound, which some video models take beside those of the pictures.
SOUND = "audio_hidden_states"
# Positions of tokens as FLUX takes them: one row per token, the same for all samples.
POSITIONS = frozenset(("img_ids", "txt_ids"))


def latents_key(inputs: Mapping[str, Any]) -> str:
    """What a forward calls its latents, which come first of its inputs."""
    return next(iter(inputs))


def is_of_latents(name: str, names: Iterable[str]) -> bool:
    """Whether a flat input is the latents, lies in the container that they are in, or is the latents of a sound beside them."""
    first = next(iter(names))
    container, entry, _ = first.partition("__")
    return name in (first, SOUND) or (bool(entry) and name.startswith(f"{container}__"))


def timestep_key(names: Collection[str]) -> str | None:
    """What a forward with these arguments calls its timestep, as diffusers' models do; None where there is none."""
    return next((name for name in TIMESTEPS if name in names), None)


def latents_of(inputs: Mapping[str, T]) -> T:
    """The latents among a forward's inputs, or what stands there for them, such as their shape."""
    return inputs[latents_key(inputs)]


def flat_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with what lies inside dicts, lists and tuples of tensors, however deep, beside the others.

    PixArt takes `added_cond_kwargs={"resolution": ..., "aspect_ratio": ...}`; flat these are `added_cond_kwargs__resolution`
    and `added_cond_kwargs__aspect_ratio`. Of CogVideoX's `image_rotary_emb=(cos, sin)` they are `image_rotary_emb__0` and
    `image_rotary_emb__1`. Containers without tensors stay as they are, as does everything else: flattening twice is flattening
    once.

    Raises:
        CompileError: Two arguments have the same flat name.
    """
    flat: dict[str, Any] = {}
    for name, value in inputs.items():
        for key, entry in _leaves(name, value) if holds_tensors(value) else ((name, value),):
            if key in flat:
                raise CompileError(
                    f"two inputs are named {key}: one inside the argument {name}, one beside it; rename one of them"
                )
            flat[key] = entry
    return flat


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What lies in a container, by flat names."""
    for key, entry in _parts(value):
        if holds_tensors(entry):
            yield from _leaves(f"{name}__{key}", entry)
        else:
            yield f"{name}__{key}", entry


def _parts(value: Any) -> Iterable[tuple[str | int, Any]]:
    """The entries of a dict by name, or of a list or tuple by number."""
    return value.items() if isinstance(value, dict) else enumerate(value)


def refuse_odd_tensors(inputs: Mapping[str, Any]) -> None:
    """Refuse tensors that are not laid out as graphs take them, and timesteps that are no real numbers.

    Raises:
        ArgumentError: The message names one.
    """
    name = timestep_key(inputs) or ""
    timestep = inputs.get(name)
    if isinstance(timestep, complex) or (isinstance(timestep, torch.Tensor) and timestep.is_complex()):
        raise ArgumentError(f"{name} is {shown(timestep)}; expected real numbers, as the scheduler has them")
    for name, value in flat_inputs(inputs).items():
        if isinstance(value, torch.Tensor) and value.layout != torch.strided:
            layout = str(value.layout).removeprefix("torch.")
            raise ArgumentError(f"{name} is {shown(value)} laid out as {layout}; expected a dense one: pass {name}.to_dense()")


def like_flat(inputs: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments in which everything that `flat` names has its value there, inside containers of tensors too."""
    return {name: _like_flat(name, value, flat) for name, value in inputs.items()}


def _like_flat(name: str, value: Any, flat: Mapping[str, Any]) -> Any:
    if not holds_tensors(value):
        return flat.get(name, value)
    entries = {key: _like_flat(f"{name}__{key}", entry, flat) for key, entry in _parts(value)}
    return entries if isinstance(value, dict) else type(value)(entries.values())


def holds_tensors(value: Any) -> bool:
    """Whether an argument is a dict by names, a list or a tuple, and has a tensor in it, however deep."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and key.isidentifier() for key in value) and any(map(_is_or_holds, value.values()))
    return type(value) in (list, tuple) and any(map(_is_or_holds, value))


def _is_or_holds(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or holds_tensors(value)
