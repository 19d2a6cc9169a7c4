"""What stepgraph has to know about a family of models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """Adapter of one model family: data and a few small functions.

    Attributes:
        classes: Names of the diffusers classes it covers.
        stack: Path of the module list whose members are the transformer blocks, in order.
        kinds: Name of a block's child module -> the site kind of its output.
        example_inputs: (configuration, batch, dtype, device) -> keyword arguments of the forward, of the right shapes.
        conditioning: (configuration, batch, device) -> (conditional, unconditional) example inputs, for sampling by name.
        embedding: Path of a module whose output is an embedding of the timestep alone, [B, D].
        random: Name -> configuration of published full-size models, built with random weights.
    """

    classes: tuple[str, ...]
    stack: str
    kinds: Mapping[str, str]
    example_inputs: Callable[[Mapping[str, Any], int, torch.dtype, torch.device], dict[str, torch.Tensor]]
    conditioning: Callable[[Mapping[str, Any], int, torch.device], tuple[dict[str, Any], dict[str, Any]]]
    embedding: str | None = None
    random: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
