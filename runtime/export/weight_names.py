"""Names for the tensors of a model's graphs, under which an export keeps each of them once."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class WeightNames:
    """Names for the tensors of a model's graphs; one tensor has one name, in however many places it stands.

    Parameters and buffers have the names that they have in the model, what is tied the first of them; constants that the
    tracer or the plan made are numbered, equal ones together.

    Args:
        model: The model.
    """

    model: nn.Module
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known: dict[tuple[Any, ...], str] = {}
        named = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            self._known.setdefault(_place(tensor), name)

    def name(self, tensor: Tensor, kind: str = "constants") -> str:
        """The name of a tensor, which is noted as used.

        Args:
            tensor: A weight, or a constant.
            kind: What the name of a constant begins with.
        """
        name = self._known.get(_place(tensor))
        if name is None:
            count = sum(known.startswith(f"{kind}.") for known in self.tensors)
            name = self._known.setdefault((kind, *_contents(tensor)), f"{kind}.{count}")
        self.tensors.setdefault(name, tensor.detach())
        return name


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _contents(tensor: Tensor) -> tuple[Any, ...]:
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return (hashlib.sha256(raw.numpy().tobytes()).hexdigest(), tensor.shape, tensor.dtype)
