"""What a run's schedule is made of, and what the model is given of its timesteps."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepgraph.checked import check_fields
from stepgraph.checks import check_number, check_numbers, check_whole
from stepgraph.errors import ArgumentError, PlanError
from stepgraph.wrapped_models import unwrapped

NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
OPERATION = re.compile(rf"cast|([/*])({NUMBER})|({NUMBER})-")


@dataclass(frozen=True)
class Schedule:
    """What a scheduler's `set_timesteps` is given beside the number of steps, and where the run begins.

    Attributes:
        sigmas: Noise levels in place of the scheduler's own spacing; empty for none.
        timesteps: Likewise timesteps.
        mu: How far a scheduler with dynamic shifting shifts them (`image_shift` for FLUX and SD3).
        begin: The first evaluation of the run; above 0, what comes before is left out, as in image to image.
    """

    sigmas: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()
    mu: float | None = None
    begin: int = 0

    def __post_init__(self) -> None:
        for name in ("sigmas", "timesteps"):
            values = getattr(self, name)
            empty = isinstance(values, (list, tuple)) and not values
            object.__setattr__(self, name, () if empty else tuple(check_numbers(name, values)))
        if self.sigmas and self.timesteps:
            raise ArgumentError("sigmas and timesteps are both given; a scheduler takes one of them")
        if self.mu is not None:
            check_number("mu", self.mu, -math.inf, what="a finite number")
        check_whole("begin", self.begin, 0)

    def steps(self, asked: int | None) -> int | None:
        """The number of inference steps: as asked, or as many as there are sigmas or timesteps.

        Raises:
            ArgumentError: Both are there and differ.
        """
        listed = self.sigmas or self.timesteps
        if not listed or asked == len(listed):
            return asked
        if asked is not None:
            name = "sigmas" if self.sigmas else "timesteps"
            raise ArgumentError(f"steps is {asked}, but {len(listed)} {name} are given; leave steps out, or give as many")
        return len(listed)

    def over(self, other: "Schedule") -> "Schedule":
        """This schedule, with the other's values for whatever it leaves open."""
        own = self if self.sigmas or self.timesteps else replace(self, sigmas=other.sigmas, timesteps=other.timesteps)
        return replace(own, mu=other.mu if own.mu is None else own.mu, begin=own.begin or other.begin)

    def shorter(self, steps: int) -> "Schedule":
        """The schedule of another number of steps: its numbers, spaced as these are between the first and the last."""
        return replace(self, sigmas=_spaced(self.sigmas, steps), timesteps=_spaced(self.timesteps, steps))

    def __str__(self) -> str:
        said = [f"{f.name}={_brief(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) not in ((), None, 0)]
        return ", ".join(said) or "no sigmas, timesteps or mu of its own"


@dataclass(frozen=True)
class TimestepInput:
    """What a pipeline makes of a scheduler's timestep before it gives it to the model.

    Attributes:
        operations: In order: "cast" (to the latents' dtype), "/1000", "*0.001", or "1000-" (that number less the value). None
            is the scheduler's value as it is.
    """

    operations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "the timestep's ")
        object.__setattr__(self, "operations", tuple(self.operations))
        for operation in self.operations:
            if not isinstance(operation, str) or not OPERATION.fullmatch(operation):
                raise PlanError(f"the timestep's operation is {operation!r}; expected 'cast', '/1000', '*0.001' or '1000-'")
            if operation != "cast" and not 0 < _operand(operation) < math.inf:
                raise PlanError(f"the timestep's operation {operation!r} needs a number above 0")

    def __call__(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """The model's timesteps, in the shape of the scheduler's and where they lie, with the bits that pipelines give.

        Args:
            timesteps: The scheduler's.
            dtype: The latents'.
        """
        for operation in self.operations:
            if operation == "cast":
                timesteps = timesteps.to(dtype)
            elif operation[0] == "/":
                timesteps = timesteps / _operand(operation)
            elif operation[0] == "*":
                timesteps = timesteps * _operand(operation)
            else:
                timesteps = _operand(operation) - timesteps
        return timesteps

    @property
    def unit(self) -> float:
        """How much the model's value changes where the scheduler's changes by 1."""
        unit = 1.0
        for operation in self.operations:
            if operation[0] in "/*":
                unit = unit / _operand(operation) if operation[0] == "/" else unit * _operand(operation)
        return unit


# Model class -> what pipelines make of the timestep for it; the adapters' entries (compiler/models).
_inputs: dict[str, TimestepInput] = {}


def register_timestep(classes: Sequence[str], timestep: TimestepInput) -> None:
    """State what models of some classes are given as their timestep."""
    _inputs.update(dict.fromkeys(classes, timestep))


def known_timestep(model: Any) -> TimestepInput | None:
    """What a model is given as its timestep, by its class; None where no adapter says so."""
    return _inputs.get(type(unwrapped(model)).__name__)


def timestep_of(model: Any) -> TimestepInput:
    """What a model is given as its timestep: by its class; the scheduler's value where it is none of diffusers'.

    Raises:
        ArgumentError: It is a class of diffusers that no adapter knows; its pipelines may give it another value.
    """
    kind, known = type(unwrapped(model)), known_timestep(model)
    if known is None and kind.__module__.startswith("diffusers."):
        raise ArgumentError(
            f"no adapter knows what pipelines make of the scheduler's timestep for {kind.__name__}; say it with timestep= in "
            f"make_plan or calibrate: () for the scheduler's own value, ('cast', '/1000') for one in 0..1; or run a session "
            f"step by step with the pipeline's own"
        )
    return known or TimestepInput()


def timestep_input(wish: "TimestepInput | Sequence[str] | None") -> TimestepInput | None:
    """What a caller says that pipelines make of the timestep: operations, or None where nothing is said."""
    return wish if wish is None or isinstance(wish, TimestepInput) else TimestepInput(tuple(wish))


def image_shift(tokens: int, config: Mapping[str, Any]) -> float:
    """The dynamic shift mu of an image's number of tokens, as FLUX and SD3 pipelines set it.

    Linear in the tokens: `base_shift` at `base_image_seq_len`, `max_shift` at `max_image_seq_len`.

    Args:
        tokens: That the transformer has of the image.
        config: The scheduler's.
    """
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - least) / (many - few)
    # In this order of operations for the bits of diffusers' pipelines.
    return float(tokens * slope + (least - slope * few))


def image_tokens(latents: Sequence[int], config: Mapping[str, Any]) -> int | None:
    """How many tokens a transformer makes of latents, without their batch: [N, C] are tokens, [C, H, W] in patches.

    Args:
        latents: Their shape.
        config: The model's.
    """
    patch = config.get("patch_size")
    if len(latents) == 2:
        return latents[0]
    if len(latents) == 3 and isinstance(patch, int) and patch > 0:
        return (latents[1] // patch) * (latents[2] // patch)
    return None


def schedule_of(wish: "Schedule | Mapping[str, Any] | None", steps: int | None, order: int = 1) -> tuple[Schedule, int | None]:
    """A schedule as a caller asks for it, and the number of its steps, which sigmas and timesteps bring.

    Args:
        wish: By name what `Schedule` holds; in place of `begin` also `strength` in 0..1, of image to image: the run begins
            where that of FLUX's and SD3's pipelines does.
        steps: As asked for.
        order: How many evaluations a step of the scheduler takes.

    Raises:
        ArgumentError: An unknown name, a wrong value, numbers that contradict each other, or a strength that leaves no step.
    """
    if isinstance(wish, Schedule):
        return wish, wish.steps(steps)
    if not isinstance(wish, (Mapping, type(None))) or not all(isinstance(name, str) for name in wish or ()):
        raise ArgumentError(f"schedule is {wish!r}; expected a mapping such as {{'sigmas': [1.0, 0.5]}}")
    values = {name: value for name, value in (wish or {}).items() if value is not None}
    names = [field.name for field in fields(Schedule)]
    unknown = sorted(set(values) - {*names, "strength"})
    if unknown:
        raise ArgumentError(f"schedule has no {unknown[0]!r}; it takes {', '.join([*names, 'strength'])}")
    for name in ("sigmas", "timesteps"):
        if name in values:
            check_numbers(name, values[name])
    strength = values.pop("strength", None)
    schedule = Schedule(**values)
    steps = schedule.steps(steps)
    if strength is None:
        return schedule, steps
    if schedule.begin or steps is None:
        raise ArgumentError(f"strength is {strength!r}; it needs the number of steps, and no begin beside it")
    return replace(schedule, begin=_first_evaluation(strength, steps, order)), steps


def counted_steps(
    wish: Schedule | Mapping[str, Any] | None, steps: int | None, scheduler: Any, otherwise: int | None = None
) -> tuple[Schedule, int]:
    """The same, where the number of steps must be known.

    Args:
        wish: See `schedule_of`.
        steps: As asked for; where sigmas or timesteps are given, their number.
        scheduler: Whose schedule it is.
        otherwise: The number of steps where nothing says it.

    Raises:
        ArgumentError: Nothing says the number of steps, or see `schedule_of`.
    """
    if isinstance(wish, Schedule):
        lists = bool(wish.sigmas or wish.timesteps)
    else:
        lists = isinstance(wish, Mapping) and any(wish.get(name) is not None for name in ("sigmas", "timesteps"))
    schedule, count = schedule_of(wish, otherwise if steps is None and not lists else steps, getattr(scheduler, "order", 1))
    if count is None:
        raise ArgumentError("steps is None; expected the number of inference steps")
    return schedule, count


def _first_evaluation(strength: Any, steps: int, order: int) -> int:
    """Where image to image of a strength begins, as FLUX's and SD3's pipelines count."""
    check_number("strength", strength, 0, 1)
    first = int(max(steps - min(steps * strength, steps), 0))
    if first >= steps:
        raise ArgumentError(f"strength is {strength}, which leaves none of the {steps} steps; take more of one of them")
    return first * order


def _spaced(numbers: tuple[float, ...], count: int) -> tuple[float, ...]:
    if len(numbers) in (0, count):
        return numbers
    return tuple(np.interp(np.linspace(0, len(numbers) - 1, count), range(len(numbers)), numbers).tolist())


def _operand(operation: str) -> float:
    return float(operation.strip("/*-"))


def _brief(value: Any) -> str:
    if not isinstance(value, tuple):
        return f"{value:g}"
    return ", ".join(f"{v:g}" for v in value) if len(value) <= 4 else f"{value[0]:g}, {value[1]:g}, ... {value[-1]:g}"
