"""The refusal of models and schedulers other than those that a plan was made for."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from stepgraph.adapters import active_adapters, tuners_of
from stepgraph.errors import MismatchError
from stepgraph.fingerprint import adapters_hash, contents_hash, dtype_name, model_dtype, structure_hash
from stepgraph.plan.header import NOTHING, PlanHeader
from stepgraph.plan.measured import NUMBERS, measured, refuse_other_values, rests_on_measurement
from stepgraph.plan.plan import CachePlan
from stepgraph.scheduler import scheduler_facts
from stepgraph.tolerances import TIMESTEPS

# How far timesteps may differ, in the scheduler's unit.
NEAR = TIMESTEPS


def refuse_other_structure(header: PlanHeader, model: nn.Module) -> None:
    """Compare a model, whatever the values of its weights, with the one a plan was made for.

    Raises:
        MismatchError: Class, dtype or structure differ; the message says both sides.
    """
    if type(model).__name__ != header.model:
        raise MismatchError(f"the plan is for {header.model}; this model is {type(model).__name__}")
    model_dtype_name = dtype_name(model_dtype(model))
    if model_dtype_name != header.dtype:
        raise MismatchError(
            f"the plan is for a {header.dtype} model; this one is {model_dtype_name}; convert the model or make a plan for it"
        )
    planned, actual = header.fingerprint.split("/")[0], structure_hash(model)
    if planned != actual and not _counts_adapters(header, model):
        raise MismatchError(
            f"the plan is for another {header.model}: its configuration or parameter shapes have the hash "
            f"{planned}, this model's {actual}"
        )


def _counts_adapters(header: PlanHeader, model: nn.Module) -> bool:
    """Whether a plan is of before there was a hash of adapters, and was made with those that the model has."""
    return header.fingerprint.split("/")[0] == structure_hash(model, adapters=True) != structure_hash(model)


def refuse_other_model(header: PlanHeader, model: nn.Module) -> None:
    """Compare a model with the one that something was measured on.

    Raises:
        MismatchError: Class, dtype, structure or weights differ; the message says both sides.
    """
    refuse_other_structure(header, model)
    difference = other_values(header, model) or other_adapters(header, model)
    if difference:
        raise MismatchError(f"{difference}; make a plan for these weights")


def follow_model(plan: CachePlan, model: nn.Module, strict: bool = False) -> str:
    """Compare a model with the one a plan was made for, whose weights' values matter as far as the plan measured them.

    Returns:
        What the user should be told of other values, once (`stepgraph.plan.measured.refuse_other_values`).

    Raises:
        MismatchError: Class, dtype or structure differ, or the values, of which the plan measured something.
    """
    refuse_other_structure(plan.header, model)
    if measured(plan) == NOTHING:
        return ""
    weights, adapters = other_values(plan.header, model), other_adapters(plan.header, model)
    if not (weights or adapters):
        return ""
    # Weights that an adapter is merged into cannot be compared without it.
    merged = any(vars(tuner).get("merged_adapters") for _, tuner in tuners_of(model))
    return refuse_other_values(plan, weights or adapters, strict, adapters=not weights or merged)


def other_values(header: PlanHeader, model: nn.Module) -> str:
    """What differs where a model's weights hold other values than a plan's; empty where nothing does, or none are known."""
    planned = header.fingerprint.split("/")[-1]
    actual = contents_hash(model, _counts_adapters(header, model), planned) if planned != "-" else "-"
    if planned == actual or "-" in (planned, actual):
        return ""
    return f"the plan is for other weights of {header.model} (hash {planned}, this model's {actual})"


def other_adapters(header: PlanHeader, model: nn.Module) -> str:
    """What differs where other adapters take part in a model's forward than in a plan's; empty where nothing does."""
    actual = "" if _counts_adapters(header, model) else adapters_hash(model)
    if header.made_with == actual or actual == "-":
        return ""
    names = sorted({name for _, name, _ in active_adapters(model)})
    now = f"this model has {', '.join(map(repr, names))} ({actual})" if actual else "this model has none"
    before = f"with others (hash {header.made_with})" if header.made_with else "without adapters"
    return f"the plan was made {before}, {now}"


def refuse_other_schedule(header: PlanHeader, scheduler: Any, what: str, follow: bool = False) -> None:
    """Compare a scheduler that is set to its steps with the one a plan was compiled for.

    Args:
        header: The plan's.
        scheduler: Set to the steps of its whole schedule, of which the plan's run may be the rest.
        what: The scheduler in words.
        follow: Whether the plan holds for any schedule of its length, as one that rests on no measurement does.

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
    if follow:
        return
    if facts["scheduler_hash"] != header.scheduler_hash:
        raise MismatchError(
            f"compiled for another configuration of {header.scheduler} (hash {header.scheduler_hash}, {what} has "
            f"{facts['scheduler_hash']}); compile a plan for this configuration"
        )
    for step, (planned, actual) in enumerate(zip(header.timesteps, facts["timesteps"], strict=True)):
        if abs(planned - actual) > NEAR:
            raise MismatchError(
                f"compiled for timestep {planned:g} at step {step}, but {what} has {actual:g} there; measure the plan with "
                f"what the sampler sets, schedule={{'sigmas': ..., 'mu': ..., 'timesteps': ...}} (now {header.schedule}; "
                f"the plan's timesteps are {_listed(header.timesteps)}, those of {what} {_listed(facts['timesteps'])})"
            )


def refuse_other_timesteps(plan: CachePlan, begin: int, timesteps: Sequence[float], strict: bool) -> str:
    """Decide whether a run of a plan may have other timesteps than those it was made for.

    Args:
        plan: The plan.
        begin: Its step with which the run begins.
        timesteps: Of the steps from there on, in the scheduler's unit.
        strict: Whether a plan whose choice was measured is refused too (`CompileConfig.strict`).

    Returns:
        What the user should be told once; empty where they are the plan's, or the plan holds for any.

    Raises:
        MismatchError: The plan computes with coefficients, which are for its own timesteps; or, if `strict`, its choice was
            measured at these.
    """
    pairs = enumerate(zip(plan.header.timesteps[begin:], timesteps, strict=True), begin)
    others = [(step, planned, asked) for step, (planned, asked) in pairs if abs(planned - asked) > NEAR]
    if not others or not rests_on_measurement(plan):
        return ""
    step, planned, asked = others[0]
    policy, what = plan.header.policy, f"compiled for timestep {planned:g} at step {step}, but the run has {asked:g} there"
    if plan.forecasts or plan.increments or measured(plan) == NUMBERS:
        raise MismatchError(
            f"{what}; the plan ({policy}) computes with coefficients or factors for its own timesteps: run these, or make a "
            f"plan for the others (schedule=)"
        )
    if strict:
        raise MismatchError(
            f"{what}; what the plan ({policy}) reuses was chosen by measuring at its own, and strict=True refuses others: make "
            f"a plan for these timesteps (schedule=), or leave strict out"
        )
    return (
        f"{what}; the plan goes on with the run's, but what it ({policy}) reuses was chosen by measuring at its own: images "
        f"can be worse. Make a plan for these timesteps (schedule=), or pass strict=True to refuse"
    )


def _listed(timesteps: Sequence[float]) -> str:
    """Timesteps in words, those in the middle of many left out."""
    values = [f"{t:g}" for t in timesteps]
    return ", ".join(values if len(values) <= 8 else [*values[:4], "...", *values[-2:]])
