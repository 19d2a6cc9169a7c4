"""From one step's model outputs to the next step's latents: by the scheduler itself, or in one pass with guidance."""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stepgraph.ops import linear_combination
from stepgraph.runtime.sampling.linear_steps import LinearSteps, Term, linear_steps
from stepgraph.scheduler import guided, scaled_input, stepped

# What kernels read in one pass; more than that, and a scheduler's own step is as fast.
MOST_VALUES = 8


class Update(Protocol):
    """A run's updates, step after step."""

    def scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """What the model gets of the latents [B, C, ...] at the present step."""

    def __call__(self, latents: Tensor, outputs: Sequence[Tensor], timestep: Tensor) -> Tensor:
        """The next step's latents.

        Args:
            latents: [B, C, ...].
            outputs: The model's for them, in their shape: one, or the wanted one and the base under guidance.
            timestep: Of the present step.
        """


class SchedulerUpdate:
    """Guidance, then the scheduler's own step."""

    def __init__(self, scheduler: Any, arguments: dict[str, float], guidance_scale: float) -> None:
        self._scheduler, self._arguments, self._guidance_scale = scheduler, arguments, guidance_scale

    def scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """See `Update`."""
        return scaled_input(self._scheduler, latents, timestep)

    def __call__(self, latents: Tensor, outputs: Sequence[Tensor], timestep: Tensor) -> Tensor:
        """See `Update`."""
        return stepped(self._scheduler, guided(outputs, self._guidance_scale), timestep, latents, self._arguments)


class FusedUpdate:
    """Guidance and the scheduler's step as one linear combination, with coefficients that lie on the device from the start.

    x' = sum_i a_i x_i + b_i (g wanted_i + (1 - g) base_i), over this step and those earlier ones that the step depends on,
    whose latents and outputs are kept until then.
    """

    def __init__(self, steps: LinearSteps, latents: Tensor, guidance_scale: float | None) -> None:
        """Lay the coefficients down: in float32, or float64 for float64 latents.

        Args:
            steps: Of the scheduler.
            latents: Like those of the run.
            guidance_scale: Under guidance.
        """
        shares = (1.0,) if guidance_scale is None else (guidance_scale, 1.0 - guidance_scale)
        combined = [_with_guidance(terms, shares) for terms in steps.terms]
        weights = [weight for terms in combined for _, _, weight in terms]
        dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
        table = torch.tensor(weights, dtype=dtype, device=latents.device).split([len(terms) for terms in combined])
        self._steps = list(zip(steps.scales, [[(age, place) for age, place, _ in terms] for terms in combined], table))
        self._number = 0
        # Per step, the latest first: latents, then outputs.
        depth = 1 + max(term.age for terms in steps.terms for term in terms)
        self._values: deque[tuple[Tensor, ...]] = deque(maxlen=depth)
        self._runs: dict[int, Callable[..., Tensor]] = {}

    def at_first_step(self) -> "FusedUpdate":
        """The updates of another run, with the same coefficients: nothing is laid down anew, no value is shared."""
        other = copy.copy(self)
        other._number, other._values = 0, deque(maxlen=self._values.maxlen)
        return other

    def scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """See `Update`."""
        scale = self._steps[self._number][0]
        return latents if scale == 1 else latents * scale

    def __call__(self, latents: Tensor, outputs: Sequence[Tensor], timestep: Tensor) -> Tensor:
        """See `Update`."""
        _, places, coefficients = self._steps[self._number]
        self._number += 1
        self._values.appendleft(tuple(_as_rows(value.to(latents.dtype)) for value in (latents, *outputs)))
        values = [self._values[age][place] for age, place in places]
        # Shapes and dtypes are those of the whole run, and providers take any strides of rows.
        if len(values) not in self._runs:
            self._runs[len(values)] = linear_combination.choose(values, coefficients).run
        return self._runs[len(values)](values, coefficients).view(latents.shape)


def choose_update(
    scheduler: Any, arguments: dict[str, float], latents: Tensor, guidance_scale: float | None, fused: bool, begin: int = 0
) -> tuple[Update, str]:
    """What updates a run's latents, and why it is not the fused update where that was asked for.

    Args:
        scheduler: Set to the run's steps; it is used up.
        arguments: Of its step.
        latents: Like those of the run.
        guidance_scale: Under guidance.
        fused: Whether to fuse where the scheduler allows.
        begin: The scheduler's evaluation with which the run begins.
    """
    reason = ""
    if fused:
        combinations = linear_steps(scheduler, arguments, begin)
        reason = combinations if isinstance(combinations, str) else _too_many(combinations, guidance_scale is not None)
        if not isinstance(combinations, str) and not reason:
            return FusedUpdate(combinations, latents, guidance_scale), ""
    return SchedulerUpdate(scheduler, arguments, 1.0 if guidance_scale is None else guidance_scale), reason


def _too_many(steps: LinearSteps, guided: bool) -> str:
    """Why steps are not taken in one pass."""
    most = max(sum(1 + (guided and term.output) for term in terms) for terms in steps.terms)
    return "" if most <= MOST_VALUES else f"a step combines {most} values; one pass takes {MOST_VALUES}"


def _with_guidance(terms: tuple[Term, ...], shares: tuple[float, ...]) -> list[tuple[int, int, float]]:
    """(age, place among that step's latents and outputs, weight) of every value that a step reads."""
    parts = []
    for term in terms:
        if term.output:
            parts += [(term.age, 1 + branch, share * term.weight) for branch, share in enumerate(shares)]
        else:
            parts.append((term.age, 0, term.weight))
    return parts


def _as_rows(value: Tensor) -> Tensor:
    """[B, C, ...] as [B, C, N]: a view also where the value is half of a batch or of the channels."""
    return value.flatten(2) if value.ndim > 3 else value
