"""The refusal of models and schedulers other than those that a plan was made for."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from stepgraph.errors import MismatchError
from stepgraph.fingerprint import dtype_name, fingerprint, model_dtype
from stepgraph.plan.header import PlanHeader
from stepgraph.scheduler import scheduler_facts

# How far timesteps may differ, in the scheduler's unit.
NEAR = 1e-3


def refuse_other_model(header: PlanHeader, model: nn.Module) -> None:
    """Compare a model with the one a plan was made for.

    Raises:
        MismatchError: Class, dtype, structure or weights differ; the message says both sides.
    """
    if type(model).__name__ != header.model:
        raise MismatchError(f"the plan is for {header.model}; this model is {type(model).__name__}")
    model_dtype_name = dtype_name(model_dtype(model))
    if model_dtype_name != header.dtype:
        raise MismatchError(
            f"the plan is for a {header.dtype} model; this one is {model_dtype_name}; convert the model or make a plan for it"
        )
    planned, actual = header.fingerprint.split("/"), fingerprint(model).split("/")
    if planned[0] != actual[0]:
        raise MismatchError(
            f"the plan is for another {header.model}: its configuration or parameter shapes have the hash "
            f"{planned[0]}, this model's {actual[0]}"
        )
    if planned[-1] != actual[-1] and "-" not in (planned[-1], actual[-1]):
        raise MismatchError(
            f"the plan is for other weights of {header.model} (hash {planned[-1]}, this model's {actual[-1]}); make a "
            f"plan for these weights"
        )


def refuse_other_schedule(header: PlanHeader, scheduler: Any, what: str, follow: bool = False) -> None:
    """Compare a scheduler that is set to its steps with the one a plan was compiled for.

    Args:
        header: The plan's.
        scheduler: Set to the steps of its whole schedule, of which the plan's run may be the rest.
        what: The scheduler in words.
        follow: Whether the plan holds for any timesteps, as one that rests on no measurement does.

    Raises:
        MismatchError: Class, number of steps, configuration or timesteps differ; the message says both sides.
    """
    facts = scheduler_facts(scheduler, header.schedule.begin)
    if facts["scheduler"] != header.scheduler:
        raise MismatchError(f"compiled for {header.scheduler}, but {what} has {facts['scheduler']}; compile a plan for it")
    evaluations = len(facts["timesteps"])
    if evaluations != len(header.timesteps):
        raise MismatchError(
            f"compiled for {header.steps} inference steps ({len(header.timesteps)} evaluations), but {what} is set to "
            f"{evaluations} evaluations; ask for {header.steps} steps or compile a plan for the other number"
        )
    if facts["scheduler_hash"] != header.scheduler_hash:
        raise MismatchError(
            f"compiled for another configuration of {header.scheduler} (hash {header.scheduler_hash}, {what} has "
            f"{facts['scheduler_hash']}); compile a plan for this configuration"
        )
    for step, (planned, actual) in enumerate(zip(header.timesteps, facts["timesteps"], strict=True)):
        if abs(planned - actual) > NEAR and not follow:
            raise MismatchError(
                f"compiled for timestep {planned:g} at step {step}, but {what} has {actual:g} there; measure the plan with "
                f"what the sampler sets, schedule={{'sigmas': ..., 'mu': ..., 'timesteps': ...}} (now {header.schedule}; "
                f"the plan's timesteps are {_listed(header.timesteps)}, those of {what} {_listed(facts['timesteps'])})"
            )


def _listed(timesteps: Sequence[float]) -> str:
    """Timesteps in words, those in the middle of many left out."""
    values = [f"{t:g}" for t in timesteps]
    return ", ".join(values if len(values) <= 8 else [*values[:4], "...", *values[-2:]])
