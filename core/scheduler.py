"""What a scheduler and classifier-free guidance do to a model's inputs and outputs, written once.

Everything that samples (the loop, its fused update, fits along trajectories, training of routers, benchmarks) takes these facts
from here; only the runner of an export, which must run without stepgraph, states them again.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stepgraph.checks import check_number, check_whole, shown
from stepgraph.errors import ArgumentError, PlanError
from stepgraph.fingerprint import config_of, hash_config
from stepgraph.inputs import POSITIONS
from stepgraph.schedule import Schedule, image_shift, image_tokens

# More than any sampler takes; a scheduler would fill the memory with its timesteps.
MOST_STEPS = 100_000


def prepare_scheduler(
    scheduler: Any, steps: int, device: torch.device | str | None = None, schedule: Schedule | None = None
) -> Any:
    """A copy of a scheduler, set to `steps` as pipelines set it; the given one keeps its state.

    `timesteps` are those of the whole schedule, also where the run begins later (`run_timesteps`).

    Raises:
        PlanError: `steps` is not a whole number that the scheduler takes; it does not take what the schedule has; it shifts by
            the size of the image, and the schedule has no mu; or nothing is left behind the schedule's beginning.
    """
    check_scheduler(scheduler)
    check_whole("steps", steps, 1, MOST_STEPS)
    schedule, prepared, name = schedule or Schedule(), copy.deepcopy(scheduler), type(scheduler).__name__
    arguments = _set_arguments(prepared, schedule)
    if config_of(scheduler).get("use_dynamic_shifting") and "mu" not in arguments:
        raise PlanError(
            f"{name} shifts its timesteps by the size of the image (use_dynamic_shifting); pass schedule={{'mu': ...}}, which "
            f"pipelines compute from the number of image tokens"
        )
    listed = arguments.keys() & {"sigmas", "timesteps"}
    try:
        prepared.set_timesteps(*([] if listed else [steps]), device=device, **arguments)
    except (TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise PlanError(f"{name} cannot be set to {steps} steps with {schedule} ({type(error).__name__}: {error})") from error
    if schedule.begin >= len(prepared.timesteps):
        raise PlanError(f"the run begins at evaluation {schedule.begin}, but {name} has {len(prepared.timesteps)}")
    if schedule.begin and hasattr(prepared, "set_begin_index"):
        prepared.set_begin_index(schedule.begin)
    return prepared


def check_scheduler(scheduler: Any) -> None:
    """Refuse what is no scheduler.

    Raises:
        ArgumentError: The message says what is expected.
    """
    missing = [name for name in ("set_timesteps", "step", "config") if not hasattr(scheduler, name)]
    if missing or isinstance(scheduler, type):
        lacks = f", which has no {missing[0]}" if missing else ""
        raise ArgumentError(f"scheduler is {shown(scheduler)}{lacks}; expected a diffusers scheduler, such as pipe.scheduler")


def _set_arguments(scheduler: Any, schedule: Schedule) -> dict[str, Any]:
    """What `set_timesteps` is given beside steps and device.

    Raises:
        ArgumentError: The scheduler does not take it.
    """
    arguments: dict[str, Any] = {name: list(values) for name in ("sigmas", "timesteps") if (values := getattr(schedule, name))}
    if "timesteps" in arguments:
        arguments["timesteps"] = [int(t) if t == int(t) else t for t in arguments["timesteps"]]
    if schedule.mu is not None:
        arguments["mu"] = schedule.mu
    parameters = inspect.signature(scheduler.set_timesteps).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in parameters and not takes_any:
            raise ArgumentError(f"{type(scheduler).__name__} takes no {name} in set_timesteps; leave it out of the schedule")
    return arguments


def shifted(schedule: Schedule, scheduler: Any, latents: Sequence[int], model: nn.Module) -> Schedule:
    """The schedule with the shift mu that pipelines compute for latents of this size, where the scheduler needs one.

    Args:
        schedule: As it is asked for.
        scheduler: Of any state.
        latents: Their shape without the batch.
        model: Whose they are.
    """
    config = config_of(scheduler)
    tokens = image_tokens(latents, config_of(model))
    if schedule.mu is not None or not config.get("use_dynamic_shifting") or tokens is None:
        return schedule
    return replace(schedule, mu=image_shift(tokens, config))


def run_timesteps(scheduler: Any, begin: int = 0) -> Tensor:
    """The timesteps [T] of a run that begins at an evaluation of a scheduler's schedule."""
    timesteps: Tensor = scheduler.timesteps[begin:]
    return timesteps


def first_latents(scheduler: Any, noise: Tensor, begin: int = 0) -> Tensor:
    """Where sampling begins, [B, C, ...], from standard normal noise; flow-matching schedulers scale it by nothing.

    A run that begins later (image to image) is given its latents as they are there.
    """
    return noise if begin else noise * getattr(scheduler, "init_noise_sigma", 1.0)


def scaled_input(scheduler: Any, latents: Tensor, timestep: Tensor) -> Tensor:
    """What the model gets of the latents [B, C, ...]; some classes count their steps by this call, as by `step`."""
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    scaled: Tensor = scheduler.scale_model_input(latents, timestep)
    return scaled


def stepped(scheduler: Any, output: Tensor, timestep: Tensor, latents: Tensor, arguments: Mapping[str, float]) -> Tensor:
    """The scheduler's own step to the next latents [B, C, ...]; it counts, so that a step on its own needs a copy."""
    moved: Tensor = scheduler.step(output, timestep, latents, **arguments, return_dict=False)[0]
    return moved


def without_variance(output: Tensor, channels: int) -> Tensor:
    """The prediction [B, C, ...] of a model that may return a learned variance behind it, in as many channels again."""
    return output.chunk(2, dim=1)[0] if output.shape[1] == 2 * channels else output


def guided(outputs: Sequence[Tensor], guidance_scale: float) -> Tensor:
    """One output as it is; of two, classifier-free guidance: base + scale * (wanted - base) (arXiv 2207.12598, in the form of
    diffusers' pipelines).
    """
    wanted, base = outputs[0], outputs[-1]
    return base + guidance_scale * (wanted - base) if len(outputs) == 2 else wanted


def refuse_stochastic(scheduler: Any, steps: int, schedule: Schedule | None = None) -> None:
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
        prepared, latents = prepare_scheduler(scheduler, steps, schedule=schedule), start
        stochastic = step_arguments(prepared)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                for t in run_timesteps(prepared, schedule.begin if schedule else 0)[:3]:
                    latents = stepped(prepared, output, t, latents, stochastic)
            except (TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
                raise PlanError(
                    f"{type(scheduler).__name__} does not step from a prediction, a timestep and a sample alone "
                    f"({type(error).__name__}: {error}); samplers that need more are not supported"
                ) from error
        ends.append(latents)
    if not torch.equal(*ends):
        raise ArgumentError(
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
    check_number("eta", eta, 0, 1, where=f" for {type(scheduler).__name__}")
    if eta and not takes:
        raise ArgumentError(f"eta is {eta!r} for {type(scheduler).__name__}; expected 0, as it has no eta")
    return {"eta": float(eta)} if takes else {}


def scheduler_facts(scheduler: Any, begin: int = 0) -> dict[str, Any]:
    """The header fields of a scheduler that has been set to its steps, for a run that begins at one of them."""
    return {
        "scheduler": type(scheduler).__name__,
        "scheduler_hash": hash_config(config_of(scheduler)),
        "timesteps": tuple(map(float, run_timesteps(scheduler, begin).tolist())),
        "prediction": _prediction(scheduler),
    }


def _prediction(scheduler: Any) -> str:
    """What a scheduler takes the model's output for, or nothing where it does not say."""
    kind = str(config_of(scheduler).get("prediction_type") or "")
    # Flow-matching schedulers have no such setting, and solvers that serve both call it by a longer name.
    if type(scheduler).__name__.startswith("FlowMatch") or kind == "flow_prediction":
        return "flow"
    return kind


def latents_name(model: nn.Module) -> str:
    """What a model calls its latents: the first argument of its class's own forward, as an attached executable replaces the
    instance's.
    """
    return list(inspect.signature(type(model).forward).parameters)[1]


def model_calls(cond: dict[str, Any], uncond: dict[str, Any] | None, separate: bool) -> list[dict[str, Any]]:
    """Per call of the model within a step, its inputs beside latents and timestep, put into batches."""
    if uncond is None:
        return [cond]
    if separate:
        return [cond, uncond]
    return [{name: value if name in POSITIONS else together(value, uncond.get(name)) for name, value in cond.items()}]


def split_conditioning(conditioning: dict[str, Any], guidance_scale: float) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Conditional inputs and, with guidance, the unconditional ones, which share the positions of tokens."""
    negative = {name.removeprefix("negative_"): value for name, value in conditioning.items() if name.startswith("negative_")}
    cond = {name: value for name, value in conditioning.items() if not name.startswith("negative_")}
    stray = sorted(set(negative) - set(cond))
    if stray:
        raise ArgumentError(f"negative_{stray[0]} is given, but {stray[0]} is not")
    # As in diffusers' pipelines, a scale of 1 or less means no guidance.
    if guidance_scale <= 1:
        return cond, None
    negative = {name: value for name, value in cond.items() if name in POSITIONS} | negative
    missing = sorted(set(cond) - set(negative))
    if missing:
        raise ArgumentError(f"guidance_scale {guidance_scale} needs the unconditional input negative_{missing[0]}")
    for name, value in cond.items():
        _refuse_unlike(name, value, negative[name])
        other = negative[name]
        if name in POSITIONS and other is not value and not torch.equal(other, value):
            raise ArgumentError(f"{name} and negative_{name} differ; both halves of the guidance are of the same tokens")
    return cond, negative


def _refuse_unlike(name: str, cond: Any, uncond: Any) -> None:
    """The halves of guidance go through the model in one batch: a tensor goes with one of its dtype, device and sizes."""
    if not isinstance(cond, torch.Tensor):
        return
    alike = isinstance(uncond, torch.Tensor) and uncond.dtype == cond.dtype and uncond.device == cond.device
    if not alike or not cond.ndim or cond.shape[1:] != uncond.shape[1:] or cond.ndim != uncond.ndim:
        raise ArgumentError(
            f"{name} is {shown(cond)} on {cond.device} and negative_{name} {shown(uncond)}; expected the same but for the rows"
        )


def together(cond: Any, uncond: Any) -> Any:
    """An input of both guidance halves in one batch."""
    return torch.cat([cond, uncond]) if isinstance(cond, torch.Tensor) else cond
