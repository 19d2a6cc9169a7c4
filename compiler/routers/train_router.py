"""Learning-to-Cache: which module may be reused at which step, learnt by gradient (arXiv 2406.01733)."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepgraph.checked import checked
from stepgraph.compiler.marking.describe import latents_shape, make_header
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.routers.mixed_model import MixedModel
from stepgraph.compiler.routers.router import Router, read_router, write_router
from stepgraph.compiler.routers.router_settings import RouterSettings, full_steps
from stepgraph.compiler.routers.router_states import (
    Conditioning,
    NoisedLatents,
    Sampling,
    States,
    Trajectories,
    clean_latents,
)
from stepgraph.errors import ArgumentError, MismatchError, PlanError
from stepgraph.fingerprint import tensor_digest
from stepgraph.plan import PlanHeader
from stepgraph.schedule import Schedule, TimestepInput, counted_steps, timestep_input, timestep_of
from stepgraph.scheduler import refuse_stochastic, shifted
from stepgraph.wrapped_models import refuse_around_measuring, unwrapped

CHECKPOINT = "stepgraph-router-checkpoint"
TABLES = ("logits", "history", "exp_avg", "exp_avg_sq", "updates", "generator")


@checked
def train_router(
    model: nn.Module,
    scheduler: Any,
    *,
    steps: int,
    settings: RouterSettings | None = None,
    data: torch.Tensor | None = None,
    conditioning: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    on_step: Callable[[int, int], None] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
    timestep: TimestepInput | Sequence[str] | None = None,
) -> Router:
    """Train one logit per routed step and module site; the model's own weights stay as they are.

    A full step fills the stored values. At the routed steps behind it every module site is
    (1 - beta) * stored + beta * fresh with beta = sigmoid(logit), and the loss of a routed step is its squared distance from
    the full model's prediction + lam * sum of betas, after the mean over the samples of that step. There is no guidance. In
    runs longer than one step the mixtures are what the next step reads, and both sides see the full model's states.

    Args:
        model: In evaluation mode, on any device.
        scheduler: A deterministic diffusers scheduler; it is copied and not changed. With `states="q_sample"` its step must
            need nothing but the prediction, so solvers with a history need `states="trajectory"`.
        steps: Number of inference steps.
        settings: The paper's unless given.
        data: Clean latents [N, C, ...] for `states="q_sample"`; the model samples `settings.pool` itself unless given.
        conditioning: The model's other inputs, as for `stepgraph.sample`: one row for each of `data`, or of the pool.
            `negative_<name>` are what dropped labels are replaced by, the family's unconditional inputs unless given. The
            family's example conditioning where neither it nor data is given.
        checkpoint: A file that is written every `every` iterations and at the end; where it exists, training goes on from it.
            A resumed training equals an uninterrupted one bit for bit.
        every: Iterations between checkpoints.
        on_step: Called with (iterations done, iterations in all).
        schedule: As for `stepgraph.sample`: what the pipeline will set its scheduler with.
        timestep: As for `stepgraph.calibrate`: what the pipeline makes of the scheduler's timestep for the model.

    Raises:
        PlanError: The settings, data or checkpoint do not fit, no step would be routed, the scheduler draws noise, or the loss
            is not finite.
        CompileError: Autocast is on, or a mode of torch's stands around.
    """
    return train_traced(
        TracedModel(unwrapped(model)), scheduler, steps=steps, settings=settings, data=data, conditioning=conditioning,
        checkpoint=checkpoint, every=every, on_step=on_step, schedule=schedule, timestep=timestep,
    )  # fmt: skip


def train_traced(
    traced: TracedModel, scheduler: Any, *, steps: int, settings: RouterSettings | None = None,
    data: torch.Tensor | None = None, conditioning: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None, every: int = 100, on_step: Callable[[int, int], None] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None, timestep: TimestepInput | Sequence[str] | None = None,
) -> Router:  # fmt: skip
    """`train_router`, on the graphs of a traced model, so that it is traced for no signature twice."""
    model = traced.model
    refuse_around_measuring(next(model.parameters()).device)
    chosen = settings or RouterSettings()
    wish, steps = counted_steps(schedule, steps, scheduler)
    example = traced.example_inputs(chosen.batch, conditioning)
    wish = shifted(wish, scheduler, latents_shape(example), model)
    refuse_stochastic(scheduler, steps, wish)
    how = Sampling(traced, scheduler, steps, example, wish, timestep_input(timestep) or timestep_of(model))
    # The graph is traced for the kind of timestep that the model is given: whole numbers or not.
    example["timestep"] = how.inputs(how.latents, how.timesteps()[:1].expand(chosen.batch), {})["timestep"]
    marked = traced.marked(example)
    header = replace(make_header(model, scheduler, steps, marked, "none", wish), timestep=how.convert)
    with torch.no_grad():
        states = _states(how, chosen, data, conditioning)
    training = _Training(MixedModel(model, marked), states, header, chosen)
    digest = _digest(data, conditioning)
    if checkpoint is not None and Path(checkpoint).exists():
        training.resume(checkpoint, digest, model)
    with _frozen(model):
        while training.done < chosen.iterations:
            training.iterate()
            if on_step is not None:
                on_step(training.done, chosen.iterations)
            if checkpoint is not None and (training.done % every == 0 or training.done == chosen.iterations):
                training.save(checkpoint, digest)
    return training.router()


class _Training:
    """Logits, optimizer and random numbers of one training."""

    def __init__(self, soft: MixedModel, states: States, header: PlanHeader, settings: RouterSettings) -> None:
        self.soft, self.states, self.header, self.settings = soft, states, header, settings
        full = full_steps(len(header.timesteps), settings.run, settings.shift)
        last = len(full) - 1
        self.starts = torch.tensor([s for s, whole in enumerate(full) if whole and s < last and not full[s + 1]])
        if not len(self.starts):
            raise ArgumentError(f"with run {settings.run} and shift {settings.shift} none of the {len(full)} steps is routed")
        generator = torch.Generator().manual_seed(settings.seed)
        first = torch.randn(len(full), len(soft.sites), generator=generator) * settings.init
        limit = settings.clamp
        first = first if limit is None else first.clamp(-limit, limit)
        # Every router has moments of its own, which stand still while its step is not drawn.
        self.rows = [row.clone().requires_grad_() for row in first]
        self.optimizer = torch.optim.AdamW(self.rows, lr=settings.lr, betas=(0.9, 0.999), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(settings.seed + 1)
        self.history: list[tuple[float, float]] = []

    @property
    def logits(self) -> torch.Tensor:
        """All routers, [T, sites]."""
        return torch.stack([row.detach() for row in self.rows])

    @property
    def done(self) -> int:
        """Iterations so far."""
        return len(self.history)

    def iterate(self) -> None:
        """One update of all logits from one batch."""
        with torch.enable_grad():
            error, computed, drawn = self.losses()
            loss = error + self.settings.lam * computed
            if not torch.isfinite(loss):
                raise PlanError(
                    f"the loss is {loss.item()} at iteration {self.done + 1} (squared error {error.item()}); the model gives "
                    f"NaN or infinite values, or lam {self.settings.lam} is too large"
                )
            # One term per routed step, so that each logit's gradient is the one of its own step's loss.
            gradients = torch.autograd.grad(loss * len(self.starts), self.rows, allow_unused=True)
        for step, (row, gradient) in enumerate(zip(self.rows, gradients, strict=True)):
            row.grad = gradient if step in drawn else None
        self.optimizer.step()
        if self.settings.clamp is not None:
            with torch.no_grad():
                for row in self.rows:
                    row.clamp_(-self.settings.clamp, self.settings.clamp)
        self.history.append((float(error.detach()), float(computed.detach())))

    def losses(self) -> tuple[torch.Tensor, torch.Tensor, set[int]]:
        """Squared error and sum of betas per window, averaged over one new batch, and the routed steps that it holds.

        Both sum over a window's routed steps.
        """
        settings = self.settings
        offset = int(torch.randint(len(self.starts), (1,), generator=self.generator))
        first = self.starts[(torch.arange(settings.batch) + offset) % len(self.starts)]
        window = self.states.window(first, settings.run, self.generator)
        with torch.no_grad():
            _, stored = self.soft.fill(window.inputs[0])
        error = computed = torch.zeros(())
        logits, drawn = torch.stack(self.rows), set()
        for position, target in enumerate(window.targets, start=1):
            beta = torch.sigmoid(logits[window.steps[position]])
            drawn |= set(window.steps[position][window.valid[position]].tolist())
            output, stored = self.soft.mix(window.inputs[position], stored, beta.to(target.device))
            squares = (output.float() - target.float()).square().flatten(1)
            row_errors = squares.mean(1) if settings.loss == "mean" else squares.sum(1)
            valid = window.valid[position].float()
            error = error + (row_errors.cpu() * valid).mean()
            computed = computed + (beta.sum(1) * valid).mean()
        return error, computed, drawn

    def router(self) -> Router:
        """What has been learnt so far."""
        history = torch.tensor(self.history, dtype=torch.float64).reshape(-1, 2)
        return Router(self.header, self.soft.sites, self.logits, self.settings, history)

    def save(self, path: str | Path, digest: str) -> None:
        """Write everything that training goes on from; the file appears whole or not at all."""
        router = self.router()
        states = [self.optimizer.state.get(row, {}) for row in self.rows]
        moments = {
            name: torch.stack(
                [state.get(name, torch.zeros_like(row)) for state, row in zip(states, router.logits, strict=True)]
            )
            for name in ("exp_avg", "exp_avg_sq")
        }
        tensors = {
            "logits": router.logits, "history": router.history, **moments, "generator": self.generator.get_state(),
            "updates": torch.tensor([float(state.get("step", 0.0)) for state in states]),
        }  # fmt: skip
        write_router(path, CHECKPOINT, self.header, self.soft.sites, self.settings, tensors, data=digest)

    def resume(self, path: str | Path, digest: str, model: nn.Module) -> None:
        """Go on from a checkpoint of the training of a model.

        Raises:
            PlanError: It is of another training; the message says what differs.
        """
        header, sites, settings, tensors, described = read_router(path, CHECKPOINT, TABLES)
        Router(header, sites, tensors["logits"], settings).refuse_other(self.header, str(path), model)
        for name in RouterSettings.__dataclass_fields__:
            before, now = getattr(settings, name), getattr(self.settings, name)
            if before != now and name != "iterations":
                raise MismatchError(
                    f"{path}: begun with {name} {before!r}, asked for is {now!r}; remove the file to begin again"
                )
        if described.get("data") != digest:
            raise MismatchError(f"{path}: begun on other data; remove the file to begin again")
        done = len(tensors["history"])
        if done > self.settings.iterations:
            raise MismatchError(f"{path}: already at iteration {done}, asked for are {self.settings.iterations}")
        for step, row in enumerate(self.rows):
            with torch.no_grad():
                row.copy_(tensors["logits"][step])
            if tensors["updates"][step]:
                moments = {name: tensors[name][step].clone() for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[row] = {"step": tensors["updates"][step].clone(), **moments}
        self.generator.set_state(tensors["generator"])
        self.history = [(float(error), float(computed)) for error, computed in tensors["history"]]


def _states(
    how: Sampling, settings: RouterSettings, data: torch.Tensor | None, conditioning: Mapping[str, Any] | None
) -> States:
    """The source of states that the settings ask for."""
    batch, dropout, generator = settings.batch, settings.label_dropout, torch.Generator().manual_seed(settings.seed + 2)
    real_runs = settings.states == "trajectory"
    size, rows = settings.pool, _rows(how, conditioning)
    if data is None and rows not in (0, size):
        raise ArgumentError(f"conditioning is of {rows} samples, the pool of {size}; pass as many rows, or pool={rows}")
    if data is not None and real_runs:
        raise ArgumentError("data is noised, but states is 'trajectory', where the model samples; pass states='q_sample'")
    if data is not None:
        wanted = tuple(how.latents.shape[1:])
        if data.ndim < 2 or not len(data) or tuple(data.shape[1:]) != wanted:
            raise ArgumentError(f"data is {list(data.shape)}; expected clean latents [N, {', '.join(map(str, wanted))}]")
        # Whoever brings latents knows what they are conditioned on.
        size, conditioning = len(data), conditioning or {}
    pool = Conditioning.of_pool(how, conditioning, size, dropout)
    if real_runs:
        return Trajectories(how, pool, size, batch, dropout, generator)
    clean = clean_latents(how, pool, size, batch, generator) if data is None else data.to(how.latents)
    return NoisedLatents(how, clean, pool, dropout)


def _rows(how: Sampling, conditioning: Mapping[str, Any] | None) -> int:
    """How many samples are conditioned; 0 where nothing says it."""
    unbatched = how.traced.family.unbatched
    values = [value for name, value in (conditioning or {}).items() if name.removeprefix("negative_") not in unbatched]
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim), 0)


def _digest(data: torch.Tensor | None, conditioning: Mapping[str, Any] | None) -> str:
    """Hash of the data that the user gave; empty where the model makes its own."""
    tensors = ([] if data is None else [data]) + [value for _, value in sorted((conditioning or {}).items())]
    return hashlib.sha256(b"".join(map(tensor_digest, tensors))).hexdigest()[:16] if tensors else ""


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters that ask for no gradients, and ask for them again afterwards."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
