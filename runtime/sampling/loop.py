"""The sampling loop itself: the same Python whether its work runs at once or is captured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepgraph.errors import MismatchError
from stepgraph.runtime.sampling.update import Update
from stepgraph.schedule import TimestepInput
from stepgraph.scheduler import first_latents, run_timesteps, without_variance


@dataclass(frozen=True)
class Loop:
    """What all runs on one schedule share.

    Attributes:
        scheduler: Set to its steps.
        latents_name: Of the model's first input.
        doubled: Whether both guidance halves are one call of the model.
        timesteps: The model's [T], as pipelines make them of the scheduler's, on the latents' device: a copy per step would
            wait for it.
        begin: The scheduler's evaluation with which the run begins.
        planned: The scheduler's timesteps from there on.
    """

    scheduler: Any
    latents_name: str
    doubled: bool
    timesteps: Tensor
    begin: int
    planned: tuple[float, ...]

    @classmethod
    def of(cls, scheduler: Any, begin: int, latents_name: str, doubled: bool, noise: Tensor, convert: TimestepInput) -> "Loop":
        """The loop of a run that begins at an evaluation of a scheduler that is set to its steps.

        Args:
            scheduler: See above; so are the next three.
            begin: Likewise.
            latents_name: Likewise.
            doubled: Likewise.
            noise: Of the run's dtype, on its device.
            convert: What pipelines make of the scheduler's timesteps for the model.
        """
        timesteps = run_timesteps(scheduler, begin)
        given = convert(timesteps.to(noise.device), noise.dtype)
        return cls(scheduler, latents_name, doubled, given, begin, tuple(map(float, timesteps.tolist())))

    def run(
        self,
        predict: Callable[..., Any],
        update: Update,
        noise: Tensor,
        calls: Sequence[Mapping[str, Any]],
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Denoise latents.

        Args:
            predict: Called like the model's forward.
            update: At its first step.
            noise: Standard normal latents [B, C, ...]; those of its first step for a run that begins later.
            calls: Per call of the model within a step, its other inputs: of the wanted output, then of the base. Every step
                sees the same tensors.
            on_step: Called with (steps done, steps in all) after every step.

        Returns:
            Latents [B, C, ...].
        """
        latents = first_latents(self.scheduler, noise, self.begin)
        times = run_timesteps(self.scheduler, self.begin)
        for step, (timestep, t) in enumerate(zip(times, self.timesteps, strict=True)):
            outputs = self._outputs(predict, update.scaled(latents, timestep), t, calls)
            outputs = [without_variance(output, latents.shape[1]) for output in outputs]
            _refuse_other_shape(outputs, latents)
            latents = update(latents, outputs, timestep)
            if on_step is not None:
                on_step(step + 1, len(self.timesteps))
        return latents

    def _outputs(
        self, predict: Callable[..., Any], latents: Tensor, t: Tensor, calls: Sequence[Mapping[str, Any]]
    ) -> Sequence[Tensor]:
        """The model's output, or the wanted one and the base under guidance."""
        batch = torch.cat([latents, latents]) if self.doubled else latents
        timestep = t.reshape(1).expand(batch.shape[0])
        outputs: list[Tensor] = [
            predict(**{self.latents_name: batch, "timestep": timestep, **call}, return_dict=False)[0] for call in calls
        ]
        return outputs[0].chunk(2) if self.doubled else outputs


def _refuse_other_shape(outputs: Sequence[Tensor], latents: Tensor) -> None:
    """Refuse predictions that no scheduler can step with.

    Raises:
        MismatchError: One has another shape than the latents, as where these cannot be cut into whole patches.
    """
    for output in outputs:
        if output.shape != latents.shape:
            raise MismatchError(
                f"the model makes {list(output.shape)} of latents {list(latents.shape)}; expected the same shape: give latents "
                f"of a size that the model takes, such as a multiple of its patches"
            )
