"""The plain sampling loop, and what a plan records of a scheduler."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stepgraph.checked import checked
from stepgraph.checks import check_number, shown
from stepgraph.env import get_logger
from stepgraph.errors import ArgumentError, CompileError, PlanError
from stepgraph.inputs import flat_inputs, refuse_odd_tensors
from stepgraph.plan.measured import rests_on_measurement
from stepgraph.plan.refuse_other import refuse_other_schedule
from stepgraph.runtime.capture.captured import LIMITS, Attempt
from stepgraph.runtime.capture.cudagraph import why_not
from stepgraph.runtime.program.bound_weights import Look
from stepgraph.runtime.program.program import signature
from stepgraph.runtime.sampling.captured_run import CapturedRun, loop_session
from stepgraph.runtime.sampling.linear_steps import scheduler_state
from stepgraph.runtime.sampling.loop import Loop
from stepgraph.runtime.sampling.update import FusedUpdate, Update, choose_update
from stepgraph.runtime.session.compiled import Compiled
from stepgraph.runtime.session.follow_weights import follow_weights
from stepgraph.runtime.session.lease_captured_steps import wants_graphs
from stepgraph.runtime.session.row_numbers import RowNumbers
from stepgraph.runtime.session.siblings import suited
from stepgraph.schedule import Schedule, TimestepInput, schedule_of, timestep_of
from stepgraph.scheduler import latents_name, model_calls, prepare_scheduler, shifted, split_conditioning, step_arguments
from stepgraph.wrapped_models import refuse_modes


@torch.no_grad()
@checked
def sample(
    runner: Compiled | nn.Module,
    scheduler: Any,
    noise: torch.Tensor,
    guidance_scale: float = 1.0,
    *,
    steps: int | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
    eta: float = 0.0,
    fused_update: bool | None = None,
    capture: bool | None = None,
    on_step: Callable[[int, int], None] | None = None,
    **conditioning: Any,
) -> torch.Tensor:
    """Denoise `noise` with an executable, or with an eager model for comparison.

    Args:
        runner: The executable, or a model (then `steps` must be given).
        scheduler: A diffusers scheduler; it is copied and not changed. Noise that a stochastic one adds is not seeded.
        noise: Standard normal latents [B, C, ...] in the model's dtype and on its device; scaled by the scheduler's
            `init_noise_sigma`. For a run that begins later (`schedule`), the latents of its first step as they are.
        guidance_scale: Above 1, classifier-free guidance: uncond + scale * (cond - uncond).
        steps: Number of inference steps; an executable brings its own.
        schedule: What the scheduler is set with: `sigmas`, `timesteps` and `mu` of its `set_timesteps`, and where the run
            begins, as `strength` in 0..1 or the evaluation `begin`. An executable brings its plan's, which holds for whatever
            is not named here; a plan that rests on measurements refuses other timesteps. Schedulers with dynamic shifting get
            the mu that pipelines compute from the latents' size unless one is given.
        eta: Share of the noise that schedulers with such an argument (DDIM) put back; 0 is deterministic.
        fused_update: Take guidance and the scheduler's step in one pass, with coefficients found before the loop; accumulated
            in float32, so rounded otherwise. None: where the scheduler's steps are fixed linear combinations, for executables
            that are not exact. True: or refuse. False: the scheduler's own step.
        capture: On CUDA, replay the whole run as one CUDA graph, which waits for nothing; the first replay is compared with the
            loop, and up to four runs are kept with the executable. Needs an executable and the fused update, and no `on_step`.
            True: at once, or refuse. False: the loop, without graphs of its steps either. None: as the executable was
            compiled (`CompileConfig.cuda_graphs`); where that is None too, which is the default, from the second run with the
            same scheduler, scale and shapes on. Where the whole run cannot be one graph then, which is said once, its steps
            are.
        on_step: Called with (steps done, steps in all) after every step.
        **conditioning: The model's other inputs, batch first; with guidance, the unconditional ones as
            `negative_<name>`.

    Returns:
        Latents [B, C, ...] of `noise`'s dtype.

    Raises:
        PlanError: The scheduler is not the one the plan was made for, an input is missing, the scale is no number, or
            `fused_update` is asked of a scheduler that clips, thresholds or adds noise.
        CompileError: `capture` is asked of a run that cannot be captured, or a mode of torch's stands around.
        ArgumentError: The noise is no dense tensor [B, C, ...] that holds values, or a class label has no row in the model's
            table.
        MismatchError: The model gives another shape than its latents have, which it cannot cut into whole patches.
    """
    check_number("guidance_scale", guidance_scale, -math.inf, what="a finite number", tail="; 1 is no guidance")
    _refuse_no_latents(noise)
    refuse_odd_tensors(conditioning)
    prepared, begin, separate = _scheduler_for(runner, scheduler, steps, schedule, noise)
    cond, uncond = split_conditioning(conditioning, guidance_scale)
    if separate and uncond is None:
        raise PlanError("the plan has one branch each for cond and uncond; pass guidance_scale above 1")
    wish = isinstance(runner, Compiled) and not runner.config.exact if fused_update is None else fused_update

    scale = None if uncond is None else guidance_scale
    update, reason = choose_update(prepared, step_arguments(prepared, eta), noise, scale, wish, begin)
    if fused_update and reason:
        raise PlanError(f"fused_update=True, but {reason}; leave it out, or use a scheduler without that")
    doubled = uncond is not None and not separate
    model = _model_of(runner)
    known = runner.plan.header.timestep if isinstance(runner, Compiled) else getattr(runner, "timestep", None)
    convert = known if isinstance(known, TimestepInput) else timestep_of(model)
    loop = Loop.of(prepared, begin, latents_name(model), doubled, noise, convert)

    def calls() -> Sequence[Mapping[str, Any]]:
        return model_calls(cond, uncond, separate)

    whole, graphs = capture is True, capture is not False
    if whole or (graphs and isinstance(runner, Compiled) and wants_graphs(runner.config, noise.device)):
        attempt = Attempt[CapturedRun](refusal=_why_uncaptured(runner, noise, update, reason, on_step) or _nested(conditioning))
        look, numbers = Look(), RowNumbers()
        if not attempt.refusal and isinstance(runner, Compiled) and isinstance(update, FusedUpdate):
            # A graph would hold what a mode makes of the run, and no later one would see another.
            refuse_modes()
            runner = suited(runner)
            look = follow_weights(runner)
            for half in (cond, uncond or {}):
                numbers.look(runner.default.table_rows, flat_inputs(half))
            key = (signature({"noise": noise, **conditioning}), guidance_scale, scheduler_state(prepared), begin)
            at_once = whole or bool(runner.config.cuda_graphs)
            attempt = _captured_run(runner, key, loop, update, noise, calls, at_once)
        if attempt.capture is not None:
            denoised = attempt.capture(noise, calls(), look)
            numbers.finish()
            return denoised
        if whole:
            raise CompileError(f"capture=True, but {attempt.refusal}; leave it out to run the loop")
        if attempt.refusal and isinstance(runner, Compiled):
            level = INFO if on_step is not None or fused_update is False else WARNING
            runner.captured.decline(attempt.refusal, "a run of sample is a loop, not one graph", level)
        # Without a refusal, the second run will be captured as a whole.
        graphs = bool(attempt.refusal)
    predict: Callable[..., Any] = loop_session(runner, loop, graphs) if isinstance(runner, Compiled) else runner
    return loop.run(predict, update, noise, calls(), on_step)


def _refuse_no_latents(noise: torch.Tensor) -> None:
    """Refuse noise that no sampler can begin with.

    Raises:
        ArgumentError: See `sample`.
    """
    if noise.device.type == "meta":
        raise ArgumentError("noise is on meta, without data; expected latents on the model's device")
    refuse_odd_tensors({"noise": noise})
    if noise.ndim < 2 or not noise.is_floating_point():
        raise ArgumentError(f"noise is {shown(noise)}; expected latents [B, C, ...] in the model's dtype")


def _captured_run(
    executable: Compiled,
    key: tuple[Any, ...],
    loop: Loop,
    update: FusedUpdate,
    noise: torch.Tensor,
    calls: Callable[[], Sequence[Mapping[str, Any]]],
    at_once: bool,
) -> Attempt[CapturedRun]:
    """The captured run of a key, captured now where it is time for that."""

    def make() -> CapturedRun:
        started = time.perf_counter()
        run = CapturedRun(executable, loop, update, executable.captured.recorder(noise.device), noise, calls())
        get_logger("capture").info(
            "captured a run of %d steps from latents %s in %.1f s, %.1f MB for itself; the last %d are kept",
            len(loop.planned), list(noise.shape), time.perf_counter() - started, run.nbytes / 1e6, LIMITS["run"],
        )  # fmt: skip
        return run

    return executable.captured.obtain(("run", *key), make, CapturedRun.valid, at_once)


def _why_uncaptured(
    runner: Compiled | nn.Module, noise: torch.Tensor, update: Update, reason: str, on_step: Callable[[int, int], None] | None
) -> str:
    """Why a run cannot be captured; empty where it can be tried."""
    if not isinstance(runner, Compiled):
        return f"{type(runner).__name__} is not compiled"
    if on_step is not None:
        return "on_step is called on the host after every step"
    if runner.config.offload:
        return "offload=True copies values on a stream of its own, beside the run (graphs of its steps go: cuda_graphs)"
    if not isinstance(update, FusedUpdate):
        return reason or "the scheduler takes its own steps, on the host (fused_update=False, or an exact executable)"
    return why_not(noise.device)


def _nested(conditioning: Mapping[str, Any]) -> str:
    """Which input holds tensors that no buffer would be made for."""
    for name, value in conditioning.items():
        if any(isinstance(leaf, torch.Tensor) and leaf is not value for leaf in pytree.tree_leaves(value)):
            return f"the input {name} is a {type(value).__name__} that holds tensors"
    return ""


def _scheduler_for(
    runner: Compiled | nn.Module,
    scheduler: Any,
    steps: int | None,
    wish: Schedule | Mapping[str, Any] | None,
    noise: torch.Tensor,
) -> tuple[Any, int, bool]:
    """A copy of the scheduler, set to the run's steps; the evaluation with which the run begins; whether cond and uncond are
    calls of their own.
    """
    order, model, latents = getattr(scheduler, "order", 1), _model_of(runner), tuple(noise.shape[1:])
    if not isinstance(runner, Compiled):
        schedule, steps = schedule_of(wish, steps, order)
        if steps is None:
            raise PlanError("steps is needed to sample with a plain model; an executable brings its own")
        schedule = shifted(schedule, scheduler, latents, model)
        return prepare_scheduler(scheduler, steps, noise.device, schedule), schedule.begin, False
    header = runner.plan.header
    if steps is not None and steps != header.steps:
        raise PlanError(f"compiled for {header.steps} inference steps, asked for {steps}")
    schedule = schedule_of(wish, header.steps, order)[0].over(header.schedule)
    if not rests_on_measurement(runner.plan):
        # A shift that was computed of the planned size is computed anew of this one.
        planned = header.shapes.get(latents_name(model), ())
        if schedule == shifted(replace(schedule, mu=None), scheduler, planned, model):
            schedule = shifted(replace(schedule, mu=None), scheduler, latents, model)
    prepared = prepare_scheduler(scheduler, header.steps, noise.device, schedule)
    refuse_other_schedule(header, prepared, "the scheduler of this call", follow=not rests_on_measurement(runner.plan))
    if schedule.begin < header.schedule.begin:
        raise PlanError(
            f"the plan's run begins at evaluation {header.schedule.begin}, asked for is {schedule.begin}; make a plan that "
            f"begins there, or earlier"
        )
    return prepared, schedule.begin, header.guidance == "separate"


def _model_of(runner: Compiled | nn.Module) -> nn.Module:
    """The model behind an executable, or behind whatever runs a model and calls it `observed`."""
    if isinstance(runner, Compiled):
        return runner.model
    model: nn.Module = getattr(runner, "observed", runner)
    return model
