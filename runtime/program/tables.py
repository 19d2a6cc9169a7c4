"""Tables: values that the loop reads but that depend on the prompt or the timestep only, computed before it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepgraph.contents import content_sums
from stepgraph.env import get_logger
from stepgraph.errors import CompileError
from stepgraph.inputs import TIMESTEPS, timestep_key
from stepgraph.runtime.program.bound_weights import version_of
from stepgraph.schedule import TimestepInput

Graph = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Table:
    """One value that variants read in place of computing it.

    Attributes:
        name: Of the node that computes it.
        bytes: Its size: of one value, or at timestep level of the values of all steps.
        per_step: Whether it depends on the timestep.
    """

    name: str
    bytes: int
    per_step: bool


@dataclass(frozen=True)
class Hoisted:
    """What is computed before the loop.

    Attributes:
        inputs: The model's inputs that it depends on, without the timestep.
        prompt: (*inputs) -> values at prompt level.
        timestep: (timestep, *inputs, *values at prompt level) -> values at timestep level, for one step.
        tables: In the order of these values, prompt level first.
        kept: Values of these that would exceed the limit and stay in the loop, by name, with their bytes.
        convert: What pipelines make of the scheduler's timestep for the model.
        rowwise: Whether each step is computed by itself: it calls modules that know of no batch of steps.
    """

    inputs: tuple[str, ...]
    prompt: Graph
    timestep: Graph
    tables: tuple[Table, ...]
    kept: Mapping[str, int]
    convert: TimestepInput
    rowwise: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of all tables of one branch."""
        return sum(table.bytes for table in self.tables)


class Tables:
    """The tables of one branch of a running session.

    Args:
        hoisted: What to compute.
        timesteps: The scheduler's timestep of every step.
        batched: All steps at once, at the first; else each step's own when it is reached, which gives the eager model's bits.
    """

    def __init__(self, hoisted: Hoisted, timesteps: Sequence[float], batched: bool) -> None:
        self.hoisted, self.timesteps, self.batched = hoisted, timesteps, batched
        self._seen: _Seen | None = None
        self._prompt: tuple[torch.Tensor, ...] = ()
        self._stacked: tuple[torch.Tensor, ...] = ()
        self._rows: list[tuple[torch.Tensor, ...]] = []
        self._expected: torch.Tensor | None = None
        self._numbers: list[float] = []
        self._late: torch.Tensor | None = None
        self._changes = 0

    def forget(self) -> None:
        """Compute everything anew at the next step, for strengths have changed.

        Raises:
            CompileError: Conditioning had changed past its version before.
        """
        self._finish_conditioning()
        self._seen = None

    def at(self, step: int, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """The values that a step reads, in the order of `Hoisted.tables`."""
        values = [inputs[name] for name in self.hoisted.inputs]
        if self._seen is None or not self._seen.compare(values):
            # A caller who makes the conditioning anew at every step would have all steps computed each time.
            self.batched = self.batched and self._changes < 2
            self._changes += 1
            self._finish_conditioning()
            self._seen = _Seen(values)
            self._prompt = self.hoisted.prompt(*values)
            self._rows = []
        if not any(table.per_step for table in self.hoisted.tables):
            return self._prompt
        timestep = _timestep_in(inputs)
        if self.batched and not self._rows:
            self._compute_all(step, timestep, values)
        if self._rows and self._compare_timestep(step, timestep):
            return self._prompt + self._rows[step]
        return self._prompt + self.hoisted.timestep(timestep, *values, *self._prompt)

    def _compute_all(self, step: int, timestep: torch.Tensor, given: Sequence[torch.Tensor]) -> None:
        """All steps in one batch, if `timestep` is what pipelines give the model at this step."""
        self._expected = _every_timestep(timestep, step, self.timesteps, self.hoisted.convert)
        if self._expected is None:
            get_logger("tables").info("step %d: the timestep is not the scheduler's; tables are computed at every step", step)
            self.batched = False
            return
        self._numbers = [] if waits(timestep.device) else self._expected.tolist()
        self._stacked = evaluate_rows(self.hoisted, self._every(timestep), [*given, *self._prompt])
        self._rows = rows_of(self._stacked)

    def _every(self, timestep: torch.Tensor) -> torch.Tensor:
        """The timestep inputs of all steps [T, *timestep]."""
        assert self._expected is not None
        return self._expected.reshape(-1, *[1] * timestep.ndim).expand(-1, *timestep.shape)

    def fixed(self, inputs: Mapping[str, Any]) -> "FixedTables":
        """The same tables at addresses that stay, for inputs that are written anew in place; after a run."""
        every = self._every(_timestep_in(inputs)) if self._rows else None
        return FixedTables(self.hoisted, [inputs[name] for name in self.hoisted.inputs], every, self._prompt, self._stacked)

    def _compare_timestep(self, step: int, timestep: torch.Tensor) -> bool:
        """Say whether a timestep is the scheduler's of this step; where that would wait it is taken so, and `finish` says."""
        assert self._expected is not None
        if not waits(timestep.device):
            return bool(set(timestep.flatten().tolist()) == {self._numbers[step]})
        differs = (timestep != self._expected[step]).any()
        self._late = differs if self._late is None else self._late | differs
        return True

    def finish(self) -> None:
        """The end of the run: on an accelerator, where nothing is waited for, say what the comparisons found.

        Raises:
            CompileError: The timesteps were others than the scheduler's, or conditioning changed past its version.
        """
        self._finish_conditioning()
        if self._late is not None and bool(self._late):
            raise CompileError(
                "the timesteps of this run were not the scheduler's that the plan was made for; tables had been computed for "
                "those. Pass the scheduler's own timesteps, or compile with hoist=False"
            )

    def _finish_conditioning(self) -> None:
        if self._seen is not None and self._seen.late is not None and bool(self._seen.late):
            raise CompileError(
                "conditioning was written to within this run in a way that torch does not count (.data, numpy, a view without "
                "a version, inference mode), so that tables of its former values were read. Write to the tensor itself, give "
                "another one, or compile with hoist=False"
            )


class _Seen:
    """Inputs as they were when tables were made of them.

    Args:
        values: The inputs.

    Attributes:
        late: On an accelerator, whether one holds other values than its version says; not waited for.
    """

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        self.late: torch.Tensor | None = None
        self._values = [value if waits(value.device) else value.clone() for value in values]
        self._versions = [version_of(value) for value in values]
        self._sums = self._digests(values)

    @staticmethod
    def _digests(values: Sequence[torch.Tensor]) -> torch.Tensor | None:
        counted = [value for value in values if waits(value.device)]
        return content_sums(counted) if counted else None

    def compare(self, values: Sequence[torch.Tensor]) -> bool:
        """Say whether inputs are what they were; where that would wait for an accelerator go by versions, and note `late`."""
        for value, seen, version in zip(values, self._values, self._versions, strict=True):
            # By the version, which misses what `.data` and inference mode write, where comparing values would wait.
            if waits(seen.device):
                if value is not seen or version_of(value) != version:
                    return False
            elif value.dtype != seen.dtype or value.device != seen.device or not torch.equal(value, seen):
                return False
        digests = self._digests(values)
        if digests is not None:
            assert self._sums is not None
            differs = (digests != self._sums).any()
            self.late = differs if self.late is None else self.late | differs
        return True


class FixedTables:
    """The tables of one branch in buffers of their own, for a run that is captured: `compute` writes them.

    Args:
        hoisted: What to compute.
        given: The inputs that it depends on, in their buffers.
        every: The timesteps of all steps [T, ...]; None where each step computes its own.
        prompt: Like the values at prompt level.
        stacked: Like those at timestep level, of all steps [T, ...].
    """

    def __init__(
        self,
        hoisted: Hoisted,
        given: Sequence[torch.Tensor],
        every: torch.Tensor | None,
        prompt: Sequence[torch.Tensor],
        stacked: Sequence[torch.Tensor],
    ) -> None:
        self._hoisted, self._given, self._every = hoisted, given, every
        self._prompt = tuple(torch.empty_like(value) for value in prompt)
        self._stacked = () if every is None else tuple(torch.empty_like(value) for value in stacked)
        self._rows = rows_of(self._stacked)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(value.nbytes for value in (*self._prompt, *self._stacked))

    def compute(self) -> None:
        """Write the tables of what is in the inputs' buffers now."""
        values = self._hoisted.prompt(*self._given)
        if self._every is not None:
            values = (*values, *evaluate_rows(self._hoisted, self._every, [*self._given, *values]))
        for buffer, value in zip((*self._prompt, *self._stacked), values, strict=True):
            buffer.copy_(value)

    def at(self, step: int, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """See `Tables.at`."""
        if self._rows:
            return self._prompt + self._rows[step]
        if not any(table.per_step for table in self._hoisted.tables):
            return self._prompt
        return self._prompt + self._hoisted.timestep(_timestep_in(inputs), *self._given, *self._prompt)

    def finish(self) -> None:
        """The timesteps are the scheduler's own: nothing to check."""


def _timestep_in(inputs: Mapping[str, Any]) -> torch.Tensor:
    """The timestep among a forward's arguments; tables at timestep level are of forwards that have one."""
    timestep: torch.Tensor = inputs[timestep_key(inputs) or TIMESTEPS[0]]
    return timestep


def evaluate_rows(hoisted: Hoisted, every: torch.Tensor, fixed: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The values at timestep level of all steps, [T, ...] each, in one batch where that goes.

    Args:
        hoisted: What to compute.
        every: The timesteps of all steps [T, ...].
        fixed: The inputs, then the values at prompt level.
    """
    if hoisted.rowwise:
        return _one_by_one(hoisted, every, fixed)
    try:
        stacked = torch.vmap(hoisted.timestep, in_dims=(0, *[None] * len(fixed)))(every, *fixed)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        get_logger("tables").info("no batch of all steps, so one after the other: %s", error)
        return _one_by_one(hoisted, every, fixed)
    return tuple(_alone(value) for value in stacked)


def _one_by_one(hoisted: Hoisted, every: torch.Tensor, fixed: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    rows = [hoisted.timestep(one.contiguous(), *fixed) for one in every]
    return tuple(torch.stack(values) for values in zip(*rows, strict=True))


def rows_of(stacked: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Per step, its values of those of all steps."""
    return list(zip(*(value.unbind(0) for value in stacked), strict=True))


def waits(device: torch.device) -> bool:
    """Whether reading a result would wait for a device that works on its own."""
    return device.type != "cpu"


def _every_timestep(given: torch.Tensor, step: int, timesteps: Sequence[float], convert: TimestepInput) -> torch.Tensor | None:
    """The timestep inputs of all steps [T] on the device of this step's; None where that is another than pipelines give."""
    # Schedulers hold them in float32 or as whole numbers; made where pipelines make them, for the bits.
    wide = torch.promote_types(given.dtype, torch.float32)
    every = convert(torch.tensor(timesteps, dtype=wide, device=given.device), given.dtype).to(given.dtype)
    return every if bool((given == every[step]).all()) else None


def _alone(value: torch.Tensor) -> torch.Tensor:
    """A slice of something larger in memory of its own, so that the larger thing can go."""
    return value.contiguous() if value.untyped_storage().nbytes() > value.nbytes else value
