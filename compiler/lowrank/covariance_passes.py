"""Measuring covariances in as many passes as a memory limit asks for."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from stepgraph.compiler.lowrank.covariance_sums import FullSum, SketchSum
from stepgraph.compiler.lowrank.increments import Target
from stepgraph.env import get_logger
from stepgraph.errors import ArgumentError
from stepgraph.files.whole_file import save_tensors

GIGA = 10**9


def plan_passes(targets: Sequence[Target], memory_gb: float | None, sketch: int | None, held: int = 1) -> list[list[Target]]:
    """Targets in graph order, cut where a pass, with its sums and `held` earlier values of each, would exceed the memory.

    Raises:
        PlanError: One target alone exceeds it.
    """
    groups: list[list[Target]] = [[]]
    filled = 0
    for target in targets:
        size = bytes_of(target, sketch, held)
        if memory_gb is not None and size > memory_gb * GIGA:
            raise ArgumentError(
                f"measuring {target.key} alone takes {size / GIGA:.3g} GB, more than the {memory_gb:g} GB allowed; raise "
                f"memory_gb (--memory-gb) or keep a sketch (--sketch)"
            )
        if memory_gb is not None and filled + size > memory_gb * GIGA:
            groups.append([])
            filled = 0
        groups[-1].append(target)
        filled += size
    return groups


def bytes_of(target: Target, sketch: int | None, held: int = 1) -> int:
    """Memory that a target's sums take, with its float32 values: of this step, `held` earlier ones, and a difference."""
    width = target.channels + sum(target.output_channels.values())
    values = (2 + held) * target.rows * width
    # A sketch is shrunk in float64, together with as many rows again and their Gram matrix.
    sums = target.channels * (target.channels if sketch is None else 7 * sketch) + target.channels * (
        sum(target.output_channels.values())
    )
    return 4 * (values + sums)


@dataclass
class PassResults:
    """What the finished passes found; beside a single pass it lies on disk."""

    groups: Sequence[Sequence[Target]]
    evaluations: int
    on_step: Callable[[int, int], None] | None
    inputs: dict[str, str] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        passes, maps = len(self.groups), sum(len(target.readers) for group in self.groups for target in group)
        text = "%d maps read %d values, measured in %d passes of %d evaluations"
        values = sum(map(len, self.groups))
        get_logger("covariances").info(text, maps, values, passes, self.evaluations)
        if passes > 1:
            self.tensors = SpilledTensors()

    def reporter(self, pass_index: int, run: int, evaluations: int) -> Callable[[int, int], None] | None:
        """What `sample` calls in a run of a pass."""
        before, total, on_step = (
            pass_index * self.evaluations + run * evaluations,
            len(self.groups) * self.evaluations,
            self.on_step,
        )
        return None if on_step is None else lambda done, _: on_step(before + done, total)

    def keep(self, pass_index: int, sums: Mapping[Target, FullSum | SketchSum]) -> None:
        """Take over the sums of a pass."""
        tensors: dict[str, Tensor] = {}
        for target, summed in sums.items():
            self.inputs |= dict.fromkeys(target.readers, target.key)
            self.numbers[target.key] = {**self.numbers.get(target.key, {}), **summed.numbers()}
            tensors |= summed.tensors(target.key)
            if isinstance(summed, FullSum):
                for path, yy in summed.yy.items():
                    self.numbers[path] = {**self.numbers.get(path, {}), "yy": yy / summed.rows}
        if isinstance(self.tensors, SpilledTensors):
            self.tensors.add(pass_index, tensors)
        else:
            self.tensors = tensors


class SpilledTensors(Mapping[str, Tensor]):
    """Tensors in a temporary folder, read one at a time; the folder goes with the object."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="stepgraph-covariances-")
        self.places: dict[str, Path] = {}

    def add(self, pass_index: int, tensors: dict[str, Tensor]) -> None:
        """Write tensors to a file of their own."""
        path = Path(self.folder.name) / f"{pass_index:04d}.safetensors"
        save_tensors(path, tensors)
        self.places |= dict.fromkeys(tensors, path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(str(self.places[name]), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def new_sum(target: Target, sketch: int | None, device: torch.device) -> FullSum | SketchSum:
    """An empty sum for a target."""
    if sketch is not None:
        return SketchSum(target.channels, sketch, device)
    return FullSum(target.channels, target.output_channels, device)
