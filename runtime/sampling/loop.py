"""The sampling loop itself: the same Python whether its work runs at once or is captured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepgraph.runtime.sampling.update import Update
from stepgraph.scheduler import first_latents, without_variance


@dataclass(frozen=True)
class Loop:
    """What all runs on one schedule share.

    Attributes:
        scheduler: Set to its steps.
        latents_name: Of the model's first input.
        doubled: Whether both guidance halves are one call of the model.
        timesteps: The scheduler's [T], on the latents' device: a copy per step would wait for it.
    """

    scheduler: Any
    latents_name: str
    doubled: bool
    timesteps: Tensor

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
            noise: Standard normal latents [B, C, ...].
            calls: Per call of the model within a step, its other inputs: of the wanted output, then of the base. Every step
                sees the same tensors.
            on_step: Called with (steps done, steps in all) after every step.

        Returns:
            Latents [B, C, ...].
        """
        latents = first_latents(self.scheduler, noise)
        for step, (timestep, t) in enumerate(zip(self.scheduler.timesteps, self.timesteps, strict=True)):
            outputs = self._outputs(predict, update.scaled(latents, timestep), t, calls)
            outputs = [without_variance(output, latents.shape[1]) for output in outputs]
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
