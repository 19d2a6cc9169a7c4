"""A sampling run taken step by step: what the model is to be given, and where the sampler goes from its outputs."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stepgraph.errors import PlanError
from stepgraph.plan import PlanHeader
from stepgraph.schedule import timestep_of
from stepgraph.scheduler import (
    first_latents,
    guided,
    latents_name,
    model_calls,
    prepare_scheduler,
    run_timesteps,
    scaled_input,
    split_conditioning,
    step_arguments,
    stepped,
    without_variance,
)
from stepgraph.tolerances import LANDING, NO_SLOPE
from stepgraph.wrapped_models import refuse_around_measuring


class Trajectory:
    """The same loop as `stepgraph.sample`, held at one step, with latents of at least float32 whatever the model's dtype.

    Attributes:
        latents: The sampler's state [B, C, ...]. In a lower precision what an output has to make up for would be rounding.
    """

    def __init__(
        self,
        header: PlanHeader,
        model: nn.Module,
        scheduler: Any,
        noise: torch.Tensor,
        guidance_scale: float,
        conditioning: Mapping[str, Any],
    ) -> None:
        refuse_around_measuring(noise.device)
        self._scheduler = prepare_scheduler(scheduler, header.steps, noise.device, header.schedule)
        self._arguments = step_arguments(self._scheduler)
        self._cond, self._uncond = split_conditioning(dict(conditioning), guidance_scale)
        self._scale, self._separate = guidance_scale, header.guidance == "separate"
        self._name = latents_name(model)
        self._convert = header.timestep or timestep_of(model)
        self._timesteps = run_timesteps(self._scheduler, header.schedule.begin)
        self._number = 0
        self._dtype = noise.dtype
        wide = noise.to(torch.promote_types(noise.dtype, torch.float32))
        self.latents = first_latents(self._scheduler, wide, header.schedule.begin)

    @property
    def _time(self) -> torch.Tensor:
        now: torch.Tensor = self._timesteps[self._number]
        return now

    def inputs(self) -> list[dict[str, Any]]:
        """What the model is given at this step, per branch."""
        scheduler, now = self._scheduler, self._time
        # Scaling counts the scheduler's steps in some classes, which only its own step may do.
        scaled = scaled_input(copy.deepcopy(scheduler), self.latents, now)
        doubled = self._uncond is not None and not self._separate
        batch = torch.cat([scaled, scaled]) if doubled else scaled
        return [self._call(batch, conditioning) for conditioning in model_calls(self._cond, self._uncond, self._separate)]

    def _call(self, batch: torch.Tensor, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        timestep = self._convert(self._time.to(batch.device).reshape(1).expand(batch.shape[0]), self._dtype)
        return {self._name: batch.to(self._dtype), "timestep": timestep, **conditioning}

    def noisy(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The latents among a branch's inputs."""
        latents: torch.Tensor = inputs[self._name]
        return latents

    def combined(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The branches' outputs under guidance, without a learned variance: what the sampler gets."""
        if self._uncond is not None and not self._separate:
            outputs = outputs[0].chunk(2)
        return without_variance(guided(outputs, self._scale).to(self.latents.dtype), self.latents.shape[1])

    def advance(self, outputs: Sequence[torch.Tensor]) -> None:
        """Go on to the next step."""
        self.latents = self._stepped(self._scheduler, self.combined(outputs))
        self._number += 1

    def landing(self, state: torch.Tensor) -> torch.Tensor:
        """The (guided) output with which the sampler would come to a state.

        Raises:
            PlanError: The scheduler's step is no straight line in the output (it clips or thresholds), or ignores it.
        """
        ends = [self._stepped(copy.deepcopy(self._scheduler), torch.full_like(state, value)) for value in (0.0, 1.0)]
        slope = (ends[1] - ends[0]).double().mean()
        name = type(self._scheduler).__name__
        if float(slope.abs()) < NO_SLOPE * float(ends[0].abs().mean()):
            raise PlanError(f"{name}: step {self._number} does not depend on the model's output; use target='own'")
        output = ((state - ends[0]).double() / slope).to(state.dtype)
        there = self._stepped(copy.deepcopy(self._scheduler), output)
        if not float((there - state).norm()) <= LANDING * float(state.norm()):
            raise PlanError(
                f"{name}: no output leads step {self._number} to a given state: the step is no straight line in the output, as "
                f"where samples are clipped or thresholded; use target='own'"
            )
        return output

    def _stepped(self, scheduler: Any, output: torch.Tensor) -> torch.Tensor:
        return stepped(scheduler, output, self._time, self.latents, self._arguments)
