"""From a policy's name to a plan."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from stepgraph.checked import checked
from stepgraph.compiler.calibration.rates import Metric
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.marking.describe import branches_of, make_header
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.planning.model_services import MODEL_SERVICES, ModelServices
from stepgraph.compiler.policies import POLICIES
from stepgraph.errors import ArgumentError, MismatchError
from stepgraph.plan import CachePlan
from stepgraph.plan.refuse_other import refuse_other_model, refuse_other_schedule
from stepgraph.schedule import Schedule, TimestepInput, counted_steps, schedule_of, timestep_input
from stepgraph.scheduler import prepare_scheduler, refuse_stochastic
from stepgraph.wrapped_models import unwrapped


def runs_model(policy: str) -> bool:
    """Whether making a plan with a policy can run the model, so that it needs its weights and not its structure alone."""
    return policy in POLICIES and any(name in MODEL_SERVICES for name in inspect.signature(POLICIES[policy].decide).parameters)


@checked
def make_plan(
    policy: str,
    stats: CalibrationStats | None = None,
    *,
    model: nn.Module | None = None,
    scheduler: Any = None,
    steps: int | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    guidance: str = "batched",
    conditioning: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    allow_stochastic: bool = False,
    checkpoint: str | Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
    timestep: TimestepInput | Sequence[str] | None = None,
    **arguments: Any,
) -> CachePlan:
    """Make a plan.

    Args:
        policy: Name of a policy; `POLICIES` lists them.
        stats: Calibration of this model under this scheduler; then `model`, `scheduler` and `steps` are not needed, unless the
            policy measures the model once more (InvarDiff's phase 2).
        model: The model the plan is for.
        scheduler: A diffusers scheduler; it is copied and not changed.
        steps: Number of inference steps.
        example_inputs: The forward's arguments, where the shapes of the conditioning, or the model's usual ones, are not meant.
        guidance: "batched" (cond and uncond in one call), "separate" (two calls a step) or "none".
        conditioning: What the model will be conditioned on, whose shapes the plan is for; with statistics what the calibration
            was given, where the policy measures once more (InvarDiff's phase 2).
        metrics: Rates of one's own that the calibration was given, likewise.
        allow_stochastic: Make a plan although the sampler adds noise.
        checkpoint: A file from which what runs the model (InvarDiff's phase 2, L2C's training) goes on after an interruption;
            delete it when the plan is saved.
        on_step: Called with (evaluations done, evaluations in all) where the policy measures.
        schedule: As for `stepgraph.sample`: what the pipeline will set its scheduler with. Statistics bring theirs.
        timestep: What the pipeline makes of the scheduler's timestep for the model, such as ("cast", "/1000"); as the model's
            adapter says unless given.
        **arguments: The policy's own.

    Raises:
        PlanError: Unknown policy or arguments, or something needed is missing.
    """
    traced = None if model is None else TracedModel(unwrapped(model))
    return plan_traced(
        policy, stats, traced, scheduler, arguments, steps=steps, example_inputs=example_inputs, guidance=guidance,
        conditioning=conditioning, metrics=metrics, allow_stochastic=allow_stochastic, checkpoint=checkpoint, on_step=on_step,
        schedule=schedule, timestep=timestep,
    )  # fmt: skip


def plan_traced(
    policy: str, stats: CalibrationStats | None, traced: TracedModel | None, scheduler: Any, arguments: Mapping[str, Any], *,
    steps: int | None, example_inputs: Mapping[str, Any] | None = None, guidance: str = "batched",
    conditioning: Mapping[str, Any] | None = None, metrics: Mapping[str, Metric] | None = None, allow_stochastic: bool = False,
    checkpoint: str | Path | None = None, on_step: Callable[[int, int], None] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None, timestep: TimestepInput | Sequence[str] | None = None,
) -> CachePlan:  # fmt: skip
    """`make_plan`, on the graphs of a traced model, so that it is traced for no signature twice."""
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ArgumentError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    _refuse_other_arguments(policy, arguments)
    if stats is not None:
        _refuse_other_circumstances(stats, traced, scheduler, steps, schedule)
        header = replace(stats.header, guidance=guidance, branches=branches_of(guidance))
        sites = stats.sites
    elif POLICIES[policy].wants_stats(arguments):
        instead = f", or {POLICIES[policy].unless}=..." if POLICIES[policy].unless else ""
        raise ArgumentError(
            f"the policy {policy!r} needs calibration; pass stats=stepgraph.calibrate(...) (--stats FILE){instead}"
        )
    elif traced is None or scheduler is None or (steps is None and schedule is None):
        missing = [n for n, v in (("model", traced), ("scheduler", scheduler), ("steps", steps)) if v is None]
        raise ArgumentError(f"the policy {policy!r} needs {', '.join(missing)} (or stats, which bring them)")
    else:
        chosen, count = counted_steps(schedule, steps, scheduler)
        if example_inputs is None and conditioning is not None:
            example_inputs = traced.example_inputs(1, conditioning)
        marked = traced.marked(example_inputs)
        header, sites = make_header(traced.model, scheduler, count, marked, guidance, chosen), marked.sites
        header = replace(header, timestep=timestep_input(timestep) or header.timestep)
        if not allow_stochastic:
            refuse_stochastic(scheduler, count, header.schedule)
    services = ModelServices(
        header, stats, traced, scheduler, conditioning, example_inputs, metrics, allow_stochastic, checkpoint, on_step
    )
    offered = {name: getattr(services, name) for name in MODEL_SERVICES if name in _parameters_of(policy)}
    actions = POLICIES[policy].decide(sites, len(header.timesteps), stats, **arguments, **offered)
    defaults = {name: p.default for name, p in _arguments_of(policy).items() if p.default is not p.empty}
    # As JSON keeps them, so that a plan read back is equal.
    recorded = json.loads(json.dumps({**defaults, **arguments}, default=str))
    measured = POLICIES[policy].measured(arguments)
    if isinstance(actions, CachePlan):
        return actions.with_header(policy=policy, arguments={**recorded, **actions.header.arguments}, measured=measured)
    return CachePlan.build(replace(header, policy=policy, arguments=recorded, measured=measured), sites, actions)


def _refuse_other_circumstances(
    stats: CalibrationStats,
    traced: TracedModel | None,
    scheduler: Any,
    steps: int | None,
    wish: Schedule | Mapping[str, Any] | None,
) -> None:
    """What is given beside statistics must be what they were measured on."""
    if traced is not None:
        refuse_other_model(stats.header, traced.model)
    if steps is not None and steps != stats.header.steps:
        raise MismatchError(
            f"the statistics are of {stats.header.steps} steps, asked for are {steps}; calibrate for that number"
        )
    if scheduler is not None:
        schedule = schedule_of(wish, stats.header.steps, getattr(scheduler, "order", 1))[0].over(stats.header.schedule)
        prepared = prepare_scheduler(scheduler, stats.header.steps, schedule=schedule)
        refuse_other_schedule(stats.header, prepared, "the given scheduler")


def _parameters_of(policy: str) -> dict[str, inspect.Parameter]:
    """A policy's keyword parameters: its arguments and the services it asks for."""
    parameters = inspect.signature(POLICIES[policy].decide).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _arguments_of(policy: str) -> dict[str, inspect.Parameter]:
    """A policy's own arguments by name."""
    return {name: p for name, p in _parameters_of(policy).items() if name not in MODEL_SERVICES}


def _refuse_other_arguments(policy: str, arguments: Mapping[str, Any]) -> None:
    known_arguments = _arguments_of(policy)
    takes = f"it takes {', '.join(known_arguments)}" if known_arguments else "it takes none"
    unknown = sorted(set(arguments) - set(known_arguments))
    if unknown:
        raise ArgumentError(f"the policy {policy!r} has no argument {unknown[0]!r}; {takes}")
    missing = [name for name, p in known_arguments.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise ArgumentError(f"the policy {policy!r} needs the argument {missing[0]!r}; {takes}")
