"""Which timestep a pipeline's call asks for, found without waiting for an accelerator where that can be."""

from typing import Any

import torch

from stepgraph.checks import shown
from stepgraph.errors import PlanError
from stepgraph.plan.refuse_other import NEAR
from stepgraph.runtime.program.tables import waits
from stepgraph.schedule import TimestepInput


class RunTimesteps:
    """A scheduler's timesteps during one run, and what the model gets of them.

    Attributes:
        timesteps: The scheduler's own tensor [T]; a scheduler makes a new one for every run.
        begin: The evaluation with which the run begins; steps count from there.
    """

    def __init__(self, timesteps: torch.Tensor, convert: TimestepInput | None = None) -> None:
        self.timesteps, self.begin, self._convert = timesteps, 0, convert or TimestepInput()
        self._values: list[float] = [float(t) for t in timesteps.tolist()]
        self._inputs: dict[torch.dtype, list[float]] = {}
        self._version = None if timesteps.is_inference() else timesteps._version
        self._near: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self._late: torch.Tensor | None = None

    @property
    def rest(self) -> list[float]:
        """The scheduler's timesteps from the beginning of the run on."""
        return self._values[self.begin :]

    def expected(self, given: Any, step: int) -> float:
        """What a call of a step has as its timestep, in the model's unit."""
        return self._converted(given)[self.begin + step]

    def near(self, given: Any, asked: float, step: int) -> bool:
        """Whether the timestep that a call asks for is a step's; it may be rounded as its dtype is."""
        return self._is_near(given, asked, self.expected(given, step))

    def find(self, given: Any, asked: float, begin_index: int | None) -> int | None:
        """The evaluation of the whole schedule that a run's first call asks for; None where it is none.

        Args:
            given: The call's timestep.
            asked: Its value.
            begin_index: The scheduler's own word, where it has one; of several evaluations at one timestep it says which.
        """
        converted = self._converted(given)
        places = [place for place, expected in enumerate(converted) if self._is_near(given, asked, expected)]
        if begin_index in places:
            return begin_index
        # In low precision neighbours may look alike.
        return min(places, key=lambda place: abs(converted[place] - asked), default=None)

    def _is_near(self, given: Any, asked: float, expected: float) -> bool:
        return bool(abs(asked - expected) <= _tolerance(expected, self._convert.unit, _dtype(given)))

    def _converted(self, given: Any) -> list[float]:
        dtype = _dtype(given)
        if dtype not in self._inputs:
            self._inputs[dtype] = [float(t) for t in self._convert(self.timesteps, dtype).tolist()]
        return self._inputs[dtype]

    def value(self, given: torch.Tensor) -> float | None:
        """The timestep of a call whose tensor is one of the scheduler's timesteps itself, repeated or not; else None.

        Samplers loop over the scheduler's tensor and expand its entries, which are views: where one lies says which it is.
        """
        steps = self.timesteps
        if not is_entry(given, steps) or self._version is None or steps._version != self._version:
            return None
        place, rest = divmod(int(given.storage_offset()) - int(steps.storage_offset()), steps.stride(0))
        return self._converted(given)[place] if rest == 0 and 0 <= place < len(self._values) else None

    def note_difference(self, given: torch.Tensor, step: int) -> None:
        """Compare a call's timesteps with those of a step on their device; `finish` says what came of it."""
        key = (given.device, given.dtype)
        if key not in self._near:
            self._near[key] = self._convert(self.timesteps.to(given.device), _dtype(given)).float()[self.begin :]
        expected = self._near[key][step]
        differs = ((given.float() - expected).abs() > _tolerance(expected, self._convert.unit, _dtype(given))).any()
        self._late = differs if self._late is None else self._late | differs

    def finish(self) -> None:
        """The end of the run.

        Raises:
            PlanError: A comparison found another timestep.
        """
        late, self._late = self._late, None
        if late is not None and bool(late):
            raise PlanError(
                "the pipeline asked for other timesteps than the plan's in this run, whose result is wrong; the plan's "
                "timesteps must be visited in order. (Found at the end: on an accelerator, reading each would wait for it)"
            )


def _dtype(given: Any) -> torch.dtype:
    """Of the latents, as far as a call's timestep shows it: where pipelines cast it, to their dtype."""
    floating = isinstance(given, torch.Tensor) and given.is_floating_point()
    return given.dtype if floating else torch.float32


def _tolerance(expected: Any, unit: float, dtype: torch.dtype) -> Any:
    """How far a timestep may be from the expected one, in the model's unit: as plans allow, and by rounding."""
    return NEAR * unit + 2 * torch.finfo(dtype).eps * abs(expected)


def is_entry(given: Any, timesteps: Any) -> bool:
    """Whether a timestep is a view of a scheduler's own tensor: one of its entries, repeated or not."""
    if not isinstance(given, torch.Tensor) or not isinstance(timesteps, torch.Tensor) or given.dtype != timesteps.dtype:
        return False
    return given.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr() and _repeated(given)


def _repeated(given: torch.Tensor) -> bool:
    """Whether a tensor is one value, expanded or not."""
    return given.numel() > 0 and all(stride == 0 or size == 1 for size, stride in zip(given.shape, given.stride()))


def needs_waiting(given: Any) -> bool:
    """Whether reading a call's timestep would wait for a device."""
    return isinstance(given, torch.Tensor) and waits(given.device)


def read_timestep(given: Any) -> float:
    """The timestep that a call asks for; one for the whole batch.

    Raises:
        PlanError: There is none, or the samples of the batch have several.
    """
    if not isinstance(given, (torch.Tensor, int, float)) or (isinstance(given, torch.Tensor) and not given.numel()):
        raise PlanError(f"the call has the timestep {given!r}; expected a number or a tensor of one per sample")
    if not isinstance(given, torch.Tensor):
        return float(given)
    flat = given.flatten()
    # Samplers expand one number over the batch; then there is nothing to compare.
    if flat.numel() > 1 and flat.stride(0) != 0 and not bool((flat == flat[0]).all()):
        raise PlanError(
            f"the call has several timesteps, {shown(flat.unique().tolist())}; a plan has one for all samples and tokens"
        )
    return float(flat[0])
