"""The states that routers are trained on: windows of one full step and the routed steps behind it."""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.routers.scheduler_steps import by_step, remembers
from stepgraph.errors import ArgumentError
from stepgraph.fingerprint import config_of, model_dtype
from stepgraph.inputs import latents_of
from stepgraph.runtime.sampling.sample import sample
from stepgraph.scheduler import (
    latents_name,
    prepare_scheduler,
    scaled_input,
    step_arguments,
    stepped,
    without_variance,
)


@dataclass(frozen=True)
class Window:
    """A batch of windows, each sample at a step of its own.

    Attributes:
        inputs: The forward's arguments at each of the run + 1 steps.
        targets: What the full model predicts at each of the run routed steps, [B, C_out, ...].
        steps: [run + 1, B] int64, the step of each sample; T - 1 for those past the end.
        valid: [run + 1, B] bool, false past the end.
    """

    inputs: list[dict[str, torch.Tensor]]
    targets: list[torch.Tensor]
    steps: torch.Tensor
    valid: torch.Tensor


class States(Protocol):
    """Where windows come from."""

    def window(self, first: torch.Tensor, run: int, generator: torch.Generator) -> Window:
        """A window for each of the full steps `first` [B] int64."""
        ...


class _RecordedModel(nn.Module):
    """Runs a model and keeps the latents that went in and what came out of every evaluation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.observed = model
        self.latents: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []

    def forward(self, return_dict: bool = False, **inputs: Any) -> tuple[torch.Tensor]:
        """One evaluation."""
        output = self.observed(**inputs, return_dict=False)[0]
        self.latents.append(latents_of(inputs).clone())
        self.outputs.append(output.clone())
        return (output,)


class Trajectories:
    """States of real sampling runs without guidance: the full model's inputs and outputs at every step, [T, pool, ...]."""

    def __init__(
        self, traced: TracedModel, scheduler: Any, steps: int, size: int, batch: int, dropout: float, seed: int
    ) -> None:
        model, generator = traced.model, torch.Generator().manual_seed(seed)
        self.conditioning = dropped(traced, own_conditioning(traced, size), dropout, generator)
        self.timesteps = prepare_scheduler(scheduler, steps).timesteps
        self.names = input_names(model)
        parts = []
        for noise, chosen in runs(traced, self.conditioning, size, batch, generator):
            recorder = _RecordedModel(model)
            sample(recorder, scheduler, noise, steps=steps, **chosen)
            parts.append((torch.stack(recorder.latents), torch.stack(recorder.outputs)))
        self.latents, self.outputs = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))

    def window(self, first: torch.Tensor, run: int, generator: torch.Generator) -> Window:
        """Windows of runs drawn at random."""
        steps, valid = steps_of(first, run, len(self.timesteps))
        device = self.latents.device
        chosen = torch.randint(self.latents.shape[1], first.shape, generator=generator).to(device)
        conditioning = {name: value[chosen] for name, value in self.conditioning.items()}
        inputs = [
            named(self.names, self.latents[indices.to(device), chosen], self.timesteps[indices].to(device), conditioning)
            for indices in steps
        ]
        return Window(inputs, [self.outputs[indices.to(device), chosen] for indices in steps[1:]], steps, valid)


class NoisedLatents:
    """States x_t made of clean latents by the scheduler's `add_noise`; the next follow by its own step of the full model.

    Raises:
        PlanError: The scheduler has no `add_noise`, or its step needs the steps before it.
    """

    def __init__(
        self,
        traced: TracedModel,
        scheduler: Any,
        steps: int,
        clean: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        dropout: float,
    ) -> None:
        self.traced, self.clean, self.conditioning, self.dropout = traced, clean, conditioning, dropout
        self.names = input_names(traced.model)
        self.scheduler = prepare_scheduler(scheduler, steps, clean.device)
        name = type(scheduler).__name__
        if not hasattr(scheduler, "add_noise"):
            raise ArgumentError(f"{name} has no add_noise, so states cannot be made of clean latents; pass states='trajectory'")
        if remembers(scheduler, steps, clean[:1]):
            raise ArgumentError(
                f"a step of {name} needs the steps before it, so it cannot start from a noised latent; pass states='trajectory'"
            )

    @torch.no_grad()
    def window(self, first: torch.Tensor, run: int, generator: torch.Generator) -> Window:
        """Windows of latents drawn at random, with fresh noise."""
        timesteps = self.scheduler.timesteps
        steps, valid = steps_of(first, run, len(timesteps))
        chosen = torch.randint(len(self.clean), first.shape, generator=generator).to(self.clean.device)
        conditioning = {name: value[chosen] for name, value in self.conditioning.items()}
        conditioning = dropped(self.traced, conditioning, self.dropout, generator)
        clean = self.clean[chosen]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        latents = self.scheduler.add_noise(clean, noise, timesteps[first.to(timesteps.device)])
        inputs: list[dict[str, torch.Tensor]] = []
        outputs: list[torch.Tensor] = []
        for indices in steps:
            if outputs:
                latents = self._stepped(outputs[-1], latents, steps[len(outputs) - 1])
            scaled = by_step(indices, latents, lambda t, x: scaled_input(copy.deepcopy(self.scheduler), x, t), timesteps)
            inputs.append(named(self.names, scaled, timesteps[indices.to(timesteps.device)], conditioning))
            outputs.append(self.traced.model(**inputs[-1], return_dict=False)[0])
        return Window(inputs, outputs[1:], steps, valid)

    def _stepped(self, output: torch.Tensor, latents: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        prediction = without_variance(output, latents.shape[1])
        both = torch.stack([prediction, latents], dim=1)
        return by_step(own, both, self._step_together, self.scheduler.timesteps)

    def _step_together(self, timestep: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        copied = copy.deepcopy(self.scheduler)
        return stepped(copied, both[:, 0], timestep, both[:, 1], step_arguments(copied))


def clean_latents(
    traced: TracedModel, scheduler: Any, steps: int, size: int, batch: int, seed: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Latents [size, C, ...] that the model itself samples without guidance, and their conditioning."""
    model, conditioning = traced.model, own_conditioning(traced, size)
    generator = torch.Generator().manual_seed(seed)
    parts = [sample(model, scheduler, n, steps=steps, **c) for n, c in runs(traced, conditioning, size, batch, generator)]
    return torch.cat(parts), conditioning


def runs(traced: TracedModel, conditioning: dict[str, torch.Tensor], size: int, batch: int, generator: torch.Generator) -> Any:
    """(noise, conditioning) of sampling runs in batches, `size` samples in all."""
    latents = latents_of(traced.example_inputs())
    for start in range(0, size, batch):
        chosen = {name: value[start : start + batch] for name, value in conditioning.items()}
        shape = (min(batch, size - start), *latents.shape[1:])
        yield torch.randn(shape, generator=generator).to(latents.device, model_dtype(traced.model)), chosen


def own_conditioning(traced: TracedModel, size: int) -> dict[str, torch.Tensor]:
    """The conditioning of a model's family, `size` samples."""
    device = next(traced.model.parameters()).device
    return dict(traced.family.conditioning(config_of(traced.model), size, device)[0])


def dropped(
    traced: TracedModel, conditioning: dict[str, torch.Tensor], share: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The conditioning with a random share of the samples replaced by the unconditional one (label dropout)."""
    first = next(iter(conditioning.values()))
    drop = torch.rand(len(first), generator=generator) < share
    if not drop.any():
        return conditioning
    nothing = traced.family.conditioning(config_of(traced.model), len(first), first.device)[1]
    replaced = {}
    for name, value in conditioning.items():
        other = nothing.get(name)
        if not isinstance(other, torch.Tensor) or other.shape != value.shape:
            raise ArgumentError(f"there is no unconditional {name} of shape {list(value.shape)}; pass label_dropout=0")
        replaced[name] = torch.where(drop.to(value.device).reshape(-1, *(1,) * (value.ndim - 1)), other.to(value), value)
    return replaced


def steps_of(first: torch.Tensor, run: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[run + 1, B] the steps of windows that begin at `first`, and which of them lie before the end."""
    steps = first[None, :] + torch.arange(run + 1)[:, None]
    return steps.clamp_max(total - 1), steps < total


def named(
    names: tuple[str, str], latents: torch.Tensor, timesteps: torch.Tensor, conditioning: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The forward's arguments."""
    return {names[0]: latents, names[1]: timesteps, **conditioning}


def input_names(model: nn.Module) -> tuple[str, str]:
    """What a model's forward calls the latents and the timestep."""
    return latents_name(model), "timestep"
