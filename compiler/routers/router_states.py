"""The states that routers are trained on: windows of one full step and the routed steps behind it."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from stepgraph.compiler.calibration.calibrate import conditioning_of
from stepgraph.compiler.marking.describe import latents_shape
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.routers.scheduler_steps import by_step, remembers
from stepgraph.errors import ArgumentError, CompileError
from stepgraph.fingerprint import config_of, model_dtype
from stepgraph.inputs import latents_of
from stepgraph.runtime.sampling.sample import sample
from stepgraph.schedule import Schedule, TimestepInput, image_tokens
from stepgraph.scheduler import (
    latents_name,
    prepare_scheduler,
    run_timesteps,
    scaled_input,
    split_conditioning,
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


@dataclass(frozen=True)
class Sampling:
    """How the routers' model is sampled, without guidance.

    Attributes:
        traced: The model.
        scheduler: A diffusers scheduler, which is not changed.
        steps: Number of inference steps.
        example: The forward's arguments, whose sizes and devices are meant.
        schedule: What the scheduler is set with beside the number of steps.
        convert: What the model is given of the scheduler's timesteps.
    """

    traced: TracedModel
    scheduler: Any
    steps: int
    example: Mapping[str, Any]
    schedule: Schedule = field(default_factory=Schedule)
    convert: TimestepInput = field(default_factory=TimestepInput)

    @property
    def latents(self) -> torch.Tensor:
        """Latents of the right shape, but for their number."""
        latents: torch.Tensor = latents_of(self.example)
        return latents

    def prepared(self) -> Any:
        """A copy of the scheduler, set to the steps."""
        return prepare_scheduler(self.scheduler, self.steps, self.latents.device, self.schedule)

    def timesteps(self) -> torch.Tensor:
        """The scheduler's timestep at every evaluation, [T]."""
        return run_timesteps(self.prepared(), self.schedule.begin)

    def inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The forward's arguments, of the scheduler's timesteps [B]."""
        now = self.convert(timesteps.to(latents.device), latents.dtype)
        return {latents_name(self.traced.model): latents, "timestep": now, **conditioning}

    def sampled(self, model: nn.Module, noise: torch.Tensor, conditioning: Mapping[str, Any]) -> torch.Tensor:
        """The final latents of a run from noise [B, C, ...], by the model or by what watches it."""
        return sample(model, self.scheduler, noise, steps=self.steps, schedule=self.schedule, **conditioning)

    def runs(
        self, conditioning: "Conditioning", size: int, batch: int, generator: torch.Generator
    ) -> Iterator[tuple[torch.Tensor, Mapping[str, Any]]]:
        """Noise and conditioning of `size` sampling runs in batches."""
        for rows in torch.arange(size).split(batch):
            noise = torch.randn((len(rows), *self.latents.shape[1:]), generator=generator)
            yield noise.to(self.latents.device, model_dtype(self.traced.model)), conditioning.of(rows).wanted


@dataclass(frozen=True)
class Conditioning:
    """What the pool's samples are conditioned on.

    Attributes:
        wanted: The forward's arguments beside latents and timestep, [N, ...] each.
        nothing: The unconditional ones, likewise; empty where none was asked for.
        whole: Names of those that have no batch dimension, such as positions of tokens.
    """

    wanted: Mapping[str, torch.Tensor]
    nothing: Mapping[str, torch.Tensor] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()

    @classmethod
    def of_pool(cls, how: Sampling, given: Mapping[str, Any] | None, size: int, dropout: float) -> "Conditioning":
        """As given, `size` rows each, or the family's; the unconditional one too where a share of the samples is to drop it.

        Raises:
            ArgumentError: What is given does not fit the model or the number of rows, or lacks the unconditional inputs.
        """
        traced, device, guided = how.traced, how.latents.device, dropout > 0
        whole = traced.family.unbatched
        tokens = image_tokens(latents_shape(how.example), config_of(traced.model))
        conditions = conditioning_of(traced, given, size, guided, device, tokens)
        if guided and not any(name.startswith("negative_") for name in conditions):
            try:
                usual = traced.family.conditioning(config_of(traced.model), size, device)[1]
            except CompileError as error:
                raise ArgumentError(
                    f"label_dropout is {dropout}, but conditioning has no unconditional inputs; pass negative_<name> too, or "
                    f"label_dropout=0"
                ) from error
            conditions |= {f"negative_{name}": value for name, value in usual.items()}
        wanted, nothing = split_conditioning(conditions, 1.0)[0], {}
        if guided:
            nothing = {name.removeprefix("negative_"): value for name, value in conditions.items() if name not in wanted}
            for name, value in wanted.items():
                other = nothing.get(name)
                if name not in whole and (not isinstance(other, torch.Tensor) or other.shape != value.shape):
                    raise ArgumentError(f"there is no unconditional {name} of shape {list(value.shape)}; pass label_dropout=0")
        return cls(wanted, nothing, whole)

    def of(self, rows: torch.Tensor) -> "Conditioning":
        """That of some rows of the pool."""
        return Conditioning(self._rows(self.wanted, rows), self._rows(self.nothing, rows), self.whole)

    def dropped(self, share: float, generator: torch.Generator) -> "Conditioning":
        """The same, a random share of the samples conditioned on nothing (label dropout)."""
        batched = {name: value for name, value in self.wanted.items() if name not in self.whole}
        drop = torch.rand(len(next(iter(batched.values()))), generator=generator) < share
        if not drop.any():
            return self
        replaced = {
            name: torch.where(drop.to(value.device).reshape(-1, *(1,) * (value.ndim - 1)), self.nothing[name].to(value), value)
            for name, value in batched.items()
        }
        return replace(self, wanted={**self.wanted, **replaced})

    def _rows(self, values: Mapping[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: value if name in self.whole else value[rows.to(value.device)] for name, value in values.items()}


class _RecordedModel(nn.Module):
    """Runs a model and keeps the latents that went in and what came out of every evaluation.

    `observed` is the model, and `timestep` what it is given as such, for `stepgraph.sample`.
    """

    def __init__(self, model: nn.Module, timestep: TimestepInput) -> None:
        super().__init__()
        self.observed, self.timestep = model, timestep
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
        self, how: Sampling, conditioning: Conditioning, size: int, batch: int, dropout: float, generator: torch.Generator
    ) -> None:
        self.how, self.timesteps = how, how.timesteps()
        self.conditioning = conditioning.dropped(dropout, generator)
        parts = []
        for noise, wanted in how.runs(self.conditioning, size, batch, generator):
            recorder = _RecordedModel(how.traced.model, how.convert)
            how.sampled(recorder, noise, wanted)
            parts.append((torch.stack(recorder.latents), torch.stack(recorder.outputs)))
        self.latents, self.outputs = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))

    def window(self, first: torch.Tensor, run: int, generator: torch.Generator) -> Window:
        """Windows of runs drawn at random."""
        steps, valid = steps_of(first, run, len(self.timesteps))
        device = self.latents.device
        chosen = torch.randint(self.latents.shape[1], first.shape, generator=generator).to(device)
        wanted = self.conditioning.of(chosen).wanted
        inputs = [
            self.how.inputs(self.latents[indices.to(device), chosen], self.timesteps[indices.to(self.timesteps.device)], wanted)
            for indices in steps
        ]
        return Window(inputs, [self.outputs[indices.to(device), chosen] for indices in steps[1:]], steps, valid)


class NoisedLatents:
    """States x_t made of clean latents by the scheduler's `add_noise`; the next follow by its own step of the full model.

    Raises:
        PlanError: The scheduler has no `add_noise`, or its step needs the steps before it.
    """

    def __init__(self, how: Sampling, clean: torch.Tensor, conditioning: Conditioning, dropout: float) -> None:
        self.how, self.clean, self.conditioning, self.dropout = how, clean, conditioning, dropout
        self.scheduler, self.timesteps = how.prepared(), how.timesteps()
        name = type(how.scheduler).__name__
        if not hasattr(how.scheduler, "add_noise"):
            raise ArgumentError(f"{name} has no add_noise, so states cannot be made of clean latents; pass states='trajectory'")
        if remembers(how.prepared, self.timesteps, clean[:1]):
            raise ArgumentError(
                f"a step of {name} needs the steps before it, so it cannot start from a noised latent; pass states='trajectory'"
            )

    @torch.no_grad()
    def window(self, first: torch.Tensor, run: int, generator: torch.Generator) -> Window:
        """Windows of latents drawn at random, with fresh noise."""
        timesteps = self.timesteps
        steps, valid = steps_of(first, run, len(timesteps))
        chosen = torch.randint(len(self.clean), first.shape, generator=generator).to(self.clean.device)
        wanted = self.conditioning.of(chosen).dropped(self.dropout, generator).wanted
        clean = self.clean[chosen]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        latents = self.scheduler.add_noise(clean, noise, timesteps[first.to(timesteps.device)])
        inputs: list[dict[str, torch.Tensor]] = []
        outputs: list[torch.Tensor] = []
        for indices in steps:
            if outputs:
                latents = self._stepped(outputs[-1], latents, steps[len(outputs) - 1])
            scaled = by_step(indices, latents, lambda t, x: scaled_input(copy.deepcopy(self.scheduler), x, t), timesteps)
            inputs.append(self.how.inputs(scaled, timesteps[indices.to(timesteps.device)], wanted))
            outputs.append(self.how.traced.model(**inputs[-1], return_dict=False)[0])
        return Window(inputs, outputs[1:], steps, valid)

    def _stepped(self, output: torch.Tensor, latents: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        prediction = without_variance(output, latents.shape[1])
        both = torch.stack([prediction, latents], dim=1)
        return by_step(own, both, self._step_together, self.timesteps)

    def _step_together(self, timestep: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        copied = copy.deepcopy(self.scheduler)
        return stepped(copied, both[:, 0], timestep, both[:, 1], step_arguments(copied))


def clean_latents(how: Sampling, conditioning: Conditioning, size: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Latents [size, C, ...] that the model itself samples without guidance."""
    return torch.cat([how.sampled(how.traced.model, *run) for run in how.runs(conditioning, size, batch, generator)])


def steps_of(first: torch.Tensor, run: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[run + 1, B] the steps of windows that begin at `first`, and which of them lie before the end."""
    steps = first[None, :] + torch.arange(run + 1)[:, None]
    return steps.clamp_max(total - 1), steps < total
