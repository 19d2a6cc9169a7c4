"""One call of an attached transformer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepgraph.errors import CompileError
from stepgraph.inputs import SOUND, flat_inputs, refuse_odd_tensors, timestep_key
from stepgraph.runtime.program.program import signature


@dataclass(frozen=True, eq=False)
class Call:
    """What a pipeline gives the transformer.

    Attributes:
        inputs: The arguments that are given, by name.
        latents: What the model calls its latents [B, ...], by name.
        signature: Shapes, dtypes and devices of the tensors, values of all else, as programs tell them apart.
    """

    inputs: Mapping[str, Any]
    latents: str
    signature: tuple[Any, ...]

    @classmethod
    def of(cls, inputs: Mapping[str, Any], latents: str) -> "Call":
        """A call from the arguments of a forward; what is None, and the form of the result, do not count."""
        counted = {name: value for name, value in inputs.items() if value is not None and name != "return_dict"}
        return cls(inputs, latents, signature(counted))

    @property
    def timestep(self) -> Any:
        """The timestep as it is given."""
        return self.inputs.get(timestep_key(self.inputs) or "")

    @property
    def conditioning(self) -> dict[str, torch.Tensor]:
        """All other tensors, by name; those inside dicts, lists and tuples under their flat names (`flat_inputs`)."""
        of_step = (timestep_key(self.inputs), self.latents, SOUND)
        rest = flat_inputs({name: value for name, value in self.inputs.items() if name not in of_step})
        return {name: value for name, value in rest.items() if isinstance(value, torch.Tensor)}

    def refuse_without_values(self) -> None:
        """Refuse tensors that hold no values, or do not hold them as graphs take them.

        Raises:
            CompileError: One is on the meta device; the message names it.
            ArgumentError: One is sparse, or the timestep is complex.
        """
        refuse_odd_tensors(self.inputs)
        for name, value in self.inputs.items():
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                raise CompileError(f"the transformer is called with {name} on the meta device, which holds no values")

    def difference(self, before: tuple[Any, ...]) -> str:
        """How the signature differs from another one, by argument; empty where it does not."""
        if self.signature == before:
            return ""
        now, then = ({entry[0]: entry[1:] for entry in entries} for entries in (self.signature, before))
        differing = [name for name in {**now, **then} if now.get(name) != then.get(name)]
        # What is no tensor says most: skip_layers, say, beside another batch.
        name = min(differing, key=lambda name: len(now.get(name) or then[name]))
        return f"{name} is {_shown(now.get(name))} ({_shown(then.get(name))} before)"

    def differs_in_sizes_only(self, before: tuple[Any, ...]) -> bool:
        """Whether arguments, dtypes and whatever is no tensor are the same."""
        return _without_sizes(self.signature, 0) == _without_sizes(before, 0)

    def differs_in_batch_only(self, before: tuple[Any, ...]) -> bool:
        """Whether another batch size is all that differs, if anything does."""
        if _without_sizes(self.signature, 1) != _without_sizes(before, 1):
            return False
        pairs = [(now[1][0], then[1][0]) for now, then in zip(self.signature, before) if _is_tensor(now) and now[1]]
        return len({now / then for now, then in pairs if now != then}) <= 1


def same_values(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> torch.Tensor | bool:
    """Whether tensors by name hold the same values: known at once where they lie in the same memory, else on their device."""
    if one.keys() != other.keys():
        return False
    equal: torch.Tensor | bool = True
    for name, value in one.items():
        then = other[name]
        if value.shape != then.shape or value.dtype != then.dtype or value.device != then.device:
            return False
        if not _same_memory(value, then):
            equal = (value == then).all() & equal
    return equal


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.shape == other.shape)


def _is_tensor(entry: tuple[Any, ...]) -> bool:
    return len(entry) == 4


def _without_sizes(signature: tuple[Any, ...], first: int) -> list[tuple[Any, ...]]:
    """A signature in which tensors have their number of dimensions, and their sizes from a dimension on if it is not 0."""
    return [
        (entry[0], len(entry[1]), entry[1][first:] if first else (), *entry[2:]) if _is_tensor(entry) else entry
        for entry in signature
    ]


def _shown(described: tuple[Any, ...] | None) -> str:
    if described is None:
        return "not there"
    return f"a {described[1]} tensor {list(described[0])}" if len(described) == 3 else str(described[0])
