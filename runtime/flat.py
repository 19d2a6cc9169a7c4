"""A variant as a flat list of calls: compiled regions and kernels, with their weights by reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepgraph.config import CompileError


@dataclass(frozen=True)
class Call:
    """One call of a flat program.

    Attributes:
        run: The region or kernel: (*tensors) -> tuple of tensors.
        reads: Registers of its arguments.
        writes: Registers of its results; None for a result that nobody reads here.
        frees: Registers that nobody reads any more.
    """

    run: Callable[..., Sequence[torch.Tensor]]
    reads: tuple[int, ...]
    writes: tuple[int | None, ...]
    frees: tuple[int, ...]


@dataclass(frozen=True)
class Flat:
    """A variant's program.

    Attributes:
        calls: In order.
        shapes: Of the arguments, which are the first registers.
        weights: Parameters, buffers and constants, in the registers behind them.
        registers: How many registers there are.
        results: Registers of what is returned.
    """

    calls: tuple[Call, ...]
    shapes: tuple[torch.Size, ...]
    weights: tuple[torch.Tensor, ...]
    registers: int
    results: tuple[int, ...]

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run it.

        Raises:
            CompileError: An argument has another shape than what was compiled for; nothing is compiled again.
        """
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes != self.shapes:
            given, expected = [tuple(shape) for shape in shapes], [tuple(shape) for shape in self.shapes]
            raise CompileError(f"compiled for arguments of the shapes {expected}; given are {given}")
        # Strides are part of what was compiled.
        arguments: list[Any] = [tensor.contiguous() for tensor in tensors]
        held = [*arguments, *self.weights, *[None] * (self.registers - len(tensors) - len(self.weights))]
        for call in self.calls:
            for register, value in zip(call.writes, call.run(*[held[i] for i in call.reads]), strict=True):
                if register is not None:
                    held[register] = value
            for register in call.frees:
                held[register] = None
        return tuple(held[register] for register in self.results)
