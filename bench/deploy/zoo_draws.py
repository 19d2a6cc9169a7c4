"""What the inputs of tiny models are drawn with, and the register of these models."""

import copy
import importlib
import types
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

# Class -> its configuration, and the inputs that a seed draws.
MODELS: dict[str, tuple[dict[str, Any], Callable[["Draws"], dict[str, Any]]]] = {}
Inputs = Callable[["Draws"], dict[str, Any]]


class Draws:
    """Random inputs of one seed, drawn one after the other."""

    def __init__(self, seed: int) -> None:
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """Normally distributed values."""
        return torch.randn(*shape, generator=self.generator)

    def timestep(self, batch: int = 2) -> torch.Tensor:
        """One of 1 to 998 for all samples [B], int64."""
        return torch.randint(1, 999, (1,), generator=self.generator).expand(batch).clone()

    def unit(self, batch: int = 2) -> torch.Tensor:
        """A value of 0 to 1 for all samples [B]."""
        return torch.rand(1, generator=self.generator).expand(batch).clone()

    def whole(self, limit: int, *shape: int) -> torch.Tensor:
        """Whole numbers below a limit, int64."""
        return torch.randint(0, limit, shape, generator=self.generator)

    def mask(self, batch: int, tokens: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
        """Masks [B, N] that leave out some of the later tokens."""
        mask = torch.ones(batch, tokens)
        for row in mask:
            row[int(torch.randint(tokens // 2, tokens, (1,), generator=self.generator)) :] = 0
        return mask.to(dtype)


def positions(rows: int, columns: int, axes: int = 3) -> torch.Tensor:
    """Positions [rows * columns, axes] of an image's tokens: 0, row, column, 0."""
    place = torch.arange(rows * columns)
    table = torch.zeros(rows * columns, axes)
    table[:, 1], table[:, 2] = place // columns, place % columns
    return table


def tiny(class_name: str, config: dict[str, Any]) -> Callable[[Inputs], Inputs]:
    """Register a class of diffusers by its configuration and the function that draws its inputs."""

    def register(inputs: Inputs) -> Inputs:
        MODELS[class_name] = config, inputs
        return inputs

    return register


def build_tiny(class_name: str) -> nn.Module:
    """A model in evaluation mode whose weights are random everywhere, zero-initialised ones too."""
    torch.manual_seed(0)
    config, _ = MODELS[class_name]
    model: nn.Module = getattr(diffusers, class_name)(**copy.deepcopy(config)).eval().float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def draw_inputs(class_name: str, seed: int) -> dict[str, Any]:
    """Keyword arguments of the class's forward."""
    return MODELS[class_name][1](Draws(seed))


def stand_in_for_torchvision() -> None:
    """Let Cosmos resize its padding mask, which it does with torchvision, by torch's own nearest interpolation."""
    module: Any = importlib.import_module("diffusers.models.transformers.transformer_cosmos")
    if hasattr(module, "transforms"):
        return

    def resize(x: torch.Tensor, size: list[int], interpolation: Any = None) -> torch.Tensor:
        return nn.functional.interpolate(x, size=tuple(size), mode="nearest")

    functional = types.SimpleNamespace(resize=resize)
    module.transforms = types.SimpleNamespace(functional=functional, InterpolationMode=types.SimpleNamespace(NEAREST="nearest"))
