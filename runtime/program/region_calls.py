"""What runs a variant: a flat list of calls of regions and kernels, or one function of the whole graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from stepgraph.errors import CompileError
from stepgraph.runtime.memory.arena import Arena, Place

# Mapped, it takes no Python.
_shape = attrgetter("shape")


class VariantCall(Protocol):
    """A variant that runs."""

    @property
    def work_bytes(self) -> int:
        """What it needs of the arena for activations."""

    def __call__(self, arguments: Sequence[Tensor], stores: Sequence[Place], arena: Arena) -> Sequence[Tensor]:
        """Run it.

        Args:
            arguments: Inputs, tensors of the slots read, constants, tables.
            stores: Where the tensors that are stored go.
            arena: The session's.

        Returns:
            The model's results.

        Raises:
            CompileError: An argument has another shape than what was compiled for; nothing is compiled again.
        """


@dataclass(frozen=True)
class GraphCall:
    """One function (*arguments) -> (*results, *tensors to store).

    Attributes:
        forward: The function.
        results: How many of its outputs are the model's results.
    """

    forward: Callable[..., Sequence[Tensor]]
    results: int
    work_bytes: int = 0

    def __call__(self, arguments: Sequence[Tensor], stores: Sequence[Place], arena: Arena) -> Sequence[Tensor]:
        """See `VariantCall`."""
        outputs = self.forward(*arguments)
        for place, value in zip(stores, outputs[self.results :], strict=True):
            arena.write(place, value)
        return outputs[: self.results]


@dataclass(frozen=True)
class RegionCall:
    """A call of a region or kernel.

    Attributes:
        run: The region or kernel: (*arguments, *memory for its results) -> nothing.
        reads: Registers of its arguments.
        writes: Registers of the memory for its results.
    """

    run: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    take: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Put together what takes the arguments out of the registers: a step makes hundreds of calls."""
        registers = (*self.reads, *self.writes)
        # Of one register, it would give the tensor alone.
        take = itemgetter(*registers) if len(registers) > 1 else lambda held: tuple(held[i] for i in registers)
        object.__setattr__(self, "take", take)


@dataclass(frozen=True)
class RegionCalls:
    """A variant's program. Its registers are the arguments, the weights, the activations, the results made, the stored tensors.

    Attributes:
        calls: In order.
        shapes: Of the arguments.
        weights: Parameters, buffers and constants; the one thing that changes (`stepgraph.runtime.program.rebind`).
        work: Places of activations that cross regions, in the arena.
        work_bytes: What they take.
        made: Results that regions write: shape, dtype and device; fresh memory in every run, for they are the caller's.
        results: Registers of the results.
        stores: Registers of the tensors that are stored.
        direct: Of these, whether a region writes it to its place, unless it is kept in a narrower dtype.
    """

    calls: tuple[RegionCall, ...]
    shapes: tuple[torch.Size, ...]
    weights: list[Tensor]
    work: tuple[Place, ...]
    work_bytes: int
    made: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]
    results: tuple[int, ...]
    stores: tuple[int, ...]
    direct: tuple[bool, ...]

    def __call__(self, arguments: Sequence[Tensor], stores: Sequence[Place], arena: Arena) -> Sequence[Tensor]:
        """See `VariantCall`."""
        shapes = tuple(map(_shape, arguments))
        if shapes != self.shapes:
            got, expected = [tuple(shape) for shape in shapes], [tuple(shape) for shape in self.shapes]
            raise CompileError(f"compiled for arguments of the shapes {expected}; given are {got}")
        # Strides are part of what was compiled.
        held = [*map(Tensor.contiguous, arguments), *self.weights, *arena.targets(self.work)]
        held += [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self.made]
        held += [
            torch.empty(place.shape, dtype=place.read_as, device=arena.memory.device) if place.narrow else arena.target(place)
            for place, direct in zip(stores, self.direct, strict=True)
            if direct
        ]
        for call in self.calls:
            call.run(*call.take(held))
        for place, register, direct in zip(stores, self.stores, self.direct, strict=True):
            if place.narrow or not direct:
                arena.write(place, held[register])
        return [held[register] for register in self.results]
