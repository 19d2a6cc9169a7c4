"""The plain sampling loop, and what a plan records of a scheduler."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stepgraph.config import CompileError
from stepgraph.fingerprint import config_of, hash_config
from stepgraph.plan import PlanError, PlanHeader
from stepgraph.runtime.captured_run import CapturedRun
from stepgraph.runtime.cudagraph import why_not
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.linear_steps import state_of
from stepgraph.runtime.loop import Loop
from stepgraph.runtime.program import signature
from stepgraph.runtime.tables import waits
from stepgraph.runtime.update import FusedUpdate, Update, choose_update


def prepare_scheduler(scheduler: Any, steps: int, device: torch.device | str | None = None) -> Any:
    """A copy of a scheduler, set to `steps`; the given one keeps its state.

    Raises:
        PlanError: `steps` is not a whole number that the scheduler takes.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PlanError(f"steps is {steps!r}; expected a whole number of at least 1")
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps, device=device)
    return own


def refuse_stochastic(scheduler: Any, steps: int) -> None:
    """See whether a scheduler adds noise: its first steps are made twice, with different seeds.

    Raises:
        PlanError: They differ.
    """
    # Schedulers that predict a variance expect it behind the noise, in as many channels again.
    learned = str(config_of(scheduler).get("variance_type", "")).startswith("learned")
    generator = torch.Generator().manual_seed(0)
    start, output = torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 8 if learned else 4, 4, 4, generator=generator)
    ends = []
    for seed in (0, 1):
        own, latents = prepare_scheduler(scheduler, steps), start
        stochastic = step_arguments(own)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                for t in own.timesteps[:3]:
                    latents = own.step(output, t, latents, **stochastic, return_dict=False)[0]
            except (TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
                raise PlanError(
                    f"{type(scheduler).__name__} does not step from a prediction, a timestep and a sample alone "
                    f"({type(error).__name__}: {error}); samplers that need more are not supported"
                ) from error
        ends.append(latents)
    if not torch.equal(*ends):
        raise PlanError(
            f"{type(scheduler).__name__} is stochastic: it adds noise at every step, so that what changes from step to step is "
            f"that noise, not what a cache could keep; use a deterministic sampler such as DDIMScheduler, or pass "
            f"allow_stochastic=True (--allow-stochastic) if that is what you want"
        )


def step_arguments(scheduler: Any, eta: float = 0.0) -> dict[str, float]:
    """The arguments of a scheduler's step that say how much noise it adds.

    Raises:
        PlanError: `eta` is not in 0..1, or is asked of a scheduler without it.
    """
    takes = "eta" in inspect.signature(scheduler.step).parameters
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1 or (eta and not takes):
        raise PlanError(f"eta is {eta!r} for {type(scheduler).__name__}; expected 0{'..1' if takes else ', as it has no eta'}")
    return {"eta": float(eta)} if takes else {}


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """The header fields of a scheduler that has been set to its steps."""
    return {
        "scheduler": type(scheduler).__name__,
        "scheduler_hash": hash_config(config_of(scheduler)),
        "timesteps": tuple(map(float, scheduler.timesteps.tolist())),
        "prediction": _prediction(scheduler),
    }


def _prediction(scheduler: Any) -> str:
    """What a scheduler takes the model's output for, or nothing where it does not say."""
    kind = str(config_of(scheduler).get("prediction_type") or "")
    # Flow-matching schedulers have no such setting, and solvers that serve both call it by a longer name.
    if type(scheduler).__name__.startswith("FlowMatch") or kind == "flow_prediction":
        return "flow"
    return kind


def refuse_other_schedule(header: PlanHeader, scheduler: Any, what: str) -> None:
    """Compare a scheduler that is set to its steps with the one a plan was compiled for.

    Raises:
        PlanError: Class, number of steps, configuration or timesteps differ; the message says both sides.
    """
    facts = scheduler_facts(scheduler)
    if facts["scheduler"] != header.scheduler:
        raise PlanError(f"compiled for {header.scheduler}, but {what} has {facts['scheduler']}; compile a plan for it")
    evaluations = len(facts["timesteps"])
    if evaluations != len(header.timesteps):
        raise PlanError(
            f"compiled for {header.steps} inference steps ({len(header.timesteps)} evaluations), but {what} is set to "
            f"{evaluations} evaluations; ask for {header.steps} steps or compile a plan for the other number"
        )
    if facts["scheduler_hash"] != header.scheduler_hash:
        raise PlanError(
            f"compiled for another configuration of {header.scheduler} (hash {header.scheduler_hash}, {what} has "
            f"{facts['scheduler_hash']}); compile a plan for this configuration"
        )
    for step, (planned, given) in enumerate(zip(header.timesteps, facts["timesteps"], strict=True)):
        if abs(planned - given) > 1e-3:
            raise PlanError(f"compiled for timestep {planned:g} at step {step}, but {what} has {given:g} there")


@torch.no_grad()
def sample(
    runner: Executable | nn.Module,
    scheduler: Any,
    noise: torch.Tensor,
    guidance_scale: float = 1.0,
    *,
    steps: int | None = None,
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
            `init_noise_sigma`.
        guidance_scale: Above 1, classifier-free guidance: uncond + scale * (cond - uncond).
        steps: Number of inference steps; an executable brings its own.
        eta: Share of the noise that schedulers with such an argument (DDIM) put back; 0 is deterministic.
        fused_update: Take guidance and the scheduler's step in one pass, with coefficients found before the loop; accumulated
            in float32, so rounded otherwise. None: where the scheduler's steps are fixed linear combinations, for executables
            that are not exact. True: or refuse. False: the scheduler's own step.
        capture: On CUDA, replay the whole run as one CUDA graph, which waits for nothing; the first replay is compared with the
            loop, and up to four runs are kept with the executable. Needs an executable and the fused update, and no `on_step`.
            True: at once, or refuse. False: the loop, without graphs of its steps either. None: as the executable was
            compiled (`CompileConfig.cuda_graphs`); where that is None too, from the second run with the same scheduler, scale
            and shapes on, where that goes.
        on_step: Called with (steps done, steps in all) after every step.
        **conditioning: The model's other inputs, batch first; with guidance, the unconditional ones as
            `negative_<name>`.

    Returns:
        Latents [B, C, ...] of `noise`'s dtype.

    Raises:
        PlanError: The scheduler is not the one the plan was made for, an input is missing, the scale is no number, or
            `fused_update` is asked of a scheduler that clips, thresholds or adds noise.
        CompileError: `capture` is asked of a run that cannot be captured.
    """
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, (int, float)) or not math.isfinite(guidance_scale):
        raise PlanError(f"guidance_scale is {guidance_scale!r}; expected a finite number; 1 is no guidance")
    own, separate = _scheduler_for(runner, scheduler, steps, noise.device)
    cond, uncond = split_conditioning(conditioning, guidance_scale)
    if separate and uncond is None:
        raise PlanError("the plan has one branch each for cond and uncond; pass guidance_scale above 1")
    wish = isinstance(runner, Executable) and not runner.config.exact if fused_update is None else fused_update

    def new_update() -> tuple[Update, str]:
        return choose_update(own, step_arguments(own, eta), noise, None if uncond is None else guidance_scale, wish)

    update, reason = new_update()
    if fused_update and reason:
        raise PlanError(f"fused_update=True, but {reason}; leave it out, or use a scheduler without that")
    loop = Loop(own, latents_name(runner), uncond is not None and not separate, own.timesteps.to(noise.device))

    def calls() -> Sequence[Mapping[str, Any]]:
        return model_calls(cond, uncond, separate)

    if capture is None and isinstance(runner, Executable):
        capture = runner.config.cuda_graphs
    graphs = capture is not False
    if capture or (capture is None and waits(noise.device)):
        refusal = _why_uncaptured(runner, noise, update, reason, on_step) or _nested(conditioning)
        found: CapturedRun | str | None = refusal
        if not refusal and isinstance(runner, Executable):
            key = (signature({"noise": noise, **conditioning}), guidance_scale, state_of(own))
            found = _captured_run(runner, key, loop, lambda: new_update()[0], noise, calls, bool(capture))
        if isinstance(found, CapturedRun):
            return found(noise, conditioning, calls)
        if capture:
            raise CompileError(f"capture=True, but {found}; leave it out to run the loop")
        # The second run will be captured as a whole.
        graphs = found is not None
    predict: Callable[..., Any] = runner.session(graphs) if isinstance(runner, Executable) else runner
    return loop.run(predict, update, noise, calls(), on_step)


def _captured_run(
    executable: Executable,
    key: tuple[Any, ...],
    loop: Loop,
    new_update: Callable[[], Update],
    noise: torch.Tensor,
    calls: Callable[[], Sequence[Mapping[str, Any]]],
    at_once: bool,
) -> CapturedRun | str | None:
    """The captured run of a key; the reason where there is none; None where it is to be captured the next time."""

    def make() -> CapturedRun:
        return CapturedRun(executable, loop, new_update, executable.captured.recorder(noise.device), noise, calls())

    return executable.captured.find(("run", *key), make, CapturedRun.valid, at_once)


def _why_uncaptured(
    runner: Executable | nn.Module, noise: torch.Tensor, update: Update, reason: str, on_step: Callable[[int, int], None] | None
) -> str:
    """Why a run cannot be captured; empty where it can be tried."""
    if not isinstance(runner, Executable):
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


def _scheduler_for(runner: Executable | nn.Module, scheduler: Any, steps: int | None, device: torch.device) -> tuple[Any, bool]:
    """A copy of the scheduler, set to the run's steps, and whether cond and uncond are calls of their own."""
    if not isinstance(runner, Executable):
        if steps is None:
            raise PlanError("steps is needed to sample with a plain model; an executable brings its own")
        return prepare_scheduler(scheduler, steps, device), False
    header = runner.plan.header
    if steps is not None and steps != header.steps:
        raise PlanError(f"compiled for {header.steps} inference steps, asked for {steps}")
    own = prepare_scheduler(scheduler, header.steps, device)
    refuse_other_schedule(header, own, "the scheduler of this call")
    return own, header.guidance == "separate"


def latents_name(runner: Executable | nn.Module) -> str:
    """Name of the model's first input."""
    # The class's own forward: the model's may be replaced by an attached executable.
    model = runner.model if isinstance(runner, Executable) else getattr(runner, "observed", runner)
    return list(inspect.signature(type(model).forward).parameters)[1]


def model_calls(cond: dict[str, Any], uncond: dict[str, Any] | None, separate: bool) -> list[dict[str, Any]]:
    """Per call of the model within a step, its inputs beside latents and timestep, put into batches."""
    if uncond is None:
        return [cond]
    return [cond, uncond] if separate else [{name: together(value, uncond.get(name)) for name, value in cond.items()}]


def split_conditioning(given: dict[str, Any], guidance_scale: float) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Conditional inputs and, with guidance, the unconditional ones."""
    negative = {name.removeprefix("negative_"): value for name, value in given.items() if name.startswith("negative_")}
    cond = {name: value for name, value in given.items() if not name.startswith("negative_")}
    stray = sorted(set(negative) - set(cond))
    if stray:
        raise PlanError(f"negative_{stray[0]} is given, but {stray[0]} is not")
    # As in diffusers' pipelines, a scale of 1 or less means no guidance.
    if guidance_scale <= 1:
        return cond, None
    missing = sorted(set(cond) - set(negative))
    if missing:
        raise PlanError(f"guidance_scale {guidance_scale} needs the unconditional input negative_{missing[0]}")
    return cond, negative


def together(cond: Any, uncond: Any) -> Any:
    """An input of both guidance halves in one batch."""
    return torch.cat([cond, uncond]) if isinstance(cond, torch.Tensor) else cond
