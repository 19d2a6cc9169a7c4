"""What stepgraph has to know about a family of models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from stepgraph.schedule import TimestepInput


@dataclass(frozen=True)
class Stack:
    """Transformer blocks of one make.

    Attributes:
        blocks: Path of the blocks, with `*` for any one part of it: "transformer_blocks.*".
        values: Name of a block's child module -> the site kinds of what one call of it returns, in order; "ff#1" -> those of
            its call 1, where they are others. Several outputs are those of a joint attention: reused all together or not at
            all. An output that nothing reads is no site.
        streams: Whether a block's first output is all that later blocks read, so that it is a site of kind `block`. It is
            not where two streams of tokens run side by side, or where later blocks read earlier ones past it.
    """

    blocks: str
    values: Mapping[str, tuple[str, ...]]
    streams: bool = False

    @property
    def children(self) -> tuple[str, ...]:
        """The names of the child modules, each once."""
        return tuple(name for name in self.values if "#" not in name)

    def kinds(self, child: str, call_index: int) -> tuple[str, ...]:
        """The site kinds of what one call of a child returns."""
        return self.values.get(f"{child}#{call_index}", self.values[child])

    def holds(self, path: str) -> bool:
        """Whether a module path is that of one of its blocks."""
        pattern, parts = self.blocks.split("."), path.split(".")
        return len(pattern) == len(parts) and all(p in ("*", part) for p, part in zip(pattern, parts, strict=True))


@dataclass(frozen=True)
class Family:
    """Adapter of one model family: data and a few small functions.

    Attributes:
        classes: Names of the diffusers classes it covers.
        stacks: The transformer blocks; none where they are found in the trace.
        example_inputs: (configuration, batch, dtype, device) -> keyword arguments of the forward, of the right shapes.
        conditioning: (configuration, batch, device) -> (conditional, unconditional) example inputs, for sampling by name.
        embedding: Path of a module whose output is an embedding of the timestep alone, [B, D].
        timestep: What pipelines make of the scheduler's timestep for the forward; None where it is not known.
        random: Name -> configuration of published full-size models, built with random weights.
        tokens: Which output of the last block are the (image) tokens that the output head takes; -1 for its last, None where
            more than these leave the stack.
        tokens_in: Which input of the first block they begin as; None where none has their shape.
        pins: Class of an attention that holds another one -> "outer" or "inner", whose value a site's is.
        unbatched: Names of the inputs whose first dimension is not the batch.
        found: Whether no adapter describes the class, so that the caller says what else its forward is called with.
        module: Where the classes are imported from.
        scheduler: Class name and configuration of the scheduler that models with random weights come with.
        optional: Names of inputs that callers may leave out, whereupon the forward runs without them.
        completed: (conditioning by name, number of image tokens or None for the usual one) -> the conditioning with what
            pipelines make themselves, such as positions; where it is None, all is to be given.
        sigmas: Number of steps -> the noise levels that its pipelines set; None where they leave them to the scheduler.
    """

    classes: tuple[str, ...]
    stacks: tuple[Stack, ...]
    example_inputs: Callable[[Mapping[str, Any], int, torch.dtype, torch.device], dict[str, torch.Tensor]]
    conditioning: Callable[[Mapping[str, Any], int, torch.device], tuple[dict[str, Any], dict[str, Any]]]
    embedding: str | None = None
    timestep: TimestepInput | None = field(default_factory=TimestepInput)
    random: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokens: int | None = 0
    tokens_in: int | None = 0
    pins: Mapping[str, str] = field(default_factory=dict)
    unbatched: frozenset[str] = frozenset()
    found: bool = False
    module: str = "diffusers"
    scheduler: tuple[str, Mapping[str, Any]] = ("DDIMScheduler", MappingProxyType({}))
    optional: frozenset[str] = frozenset()
    completed: Callable[[dict[str, Any], int | None], dict[str, Any]] | None = None
    sigmas: Callable[[int], tuple[float, ...]] | None = None

    def holds_block(self, path: str) -> bool:
        """Whether a module path is that of a transformer block."""
        return any(stack.holds(path) for stack in self.stacks)
