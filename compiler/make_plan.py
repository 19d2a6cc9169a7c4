"""From a policy's name to a plan."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stepgraph.compiler.calibrate import calibrate
from stepgraph.compiler.describe import branches_of, make_header, marked_graph
from stepgraph.compiler.policies import POLICIES
from stepgraph.compiler.router import Router
from stepgraph.compiler.router_settings import settings_of
from stepgraph.compiler.stats import CalibrationStats
from stepgraph.compiler.train_router import train_router
from stepgraph.fingerprint import refuse_other_model
from stepgraph.plan import CachePlan, PlanError, PlanHeader
from stepgraph.runtime.sampler import prepare_scheduler, refuse_other_schedule

# Parameters of policies that make_plan fills in; users do not pass them.
SERVICES = ("again", "train")


def make_plan(
    policy: str,
    stats: CalibrationStats | None = None,
    *,
    model: nn.Module | None = None,
    scheduler: Any = None,
    steps: int | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    guidance: str = "batched",
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
        example_inputs: The forward's arguments, where the model's usual shapes are not meant.
        guidance: "batched" (cond and uncond in one call), "separate" (two calls a step) or "none".
        **arguments: The policy's own.

    Raises:
        PlanError: Unknown policy or arguments, or something needed is missing.
    """
    if policy not in POLICIES:
        raise PlanError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    _refuse_other_arguments(policy, arguments)
    if stats is not None:
        _refuse_other_circumstances(stats, model, scheduler, steps)
        header = replace(stats.header, guidance=guidance, branches=branches_of(guidance))
        sites = stats.sites
    elif POLICIES[policy].needs_stats:
        raise PlanError(f"the policy {policy!r} needs calibration; pass stats=stepgraph.calibrate(...)")
    elif model is None or scheduler is None or steps is None:
        missing = [n for n, v in (("model", model), ("scheduler", scheduler), ("steps", steps)) if v is None]
        raise PlanError(f"the policy {policy!r} needs {', '.join(missing)} (or stats, which bring them)")
    else:
        marked = marked_graph(model, example_inputs)
        header, sites = make_header(model, scheduler, steps, marked, guidance), marked.sites
    services = {name: s for name, s in _services(header, stats, model, scheduler).items() if name in _parameters_of(policy)}
    actions = POLICIES[policy].decide(sites, len(header.timesteps), stats, **arguments, **services)
    defaults = {name: p.default for name, p in _arguments_of(policy).items() if p.default is not p.empty}
    # As JSON keeps them, so that a plan read back is equal.
    recorded = json.loads(json.dumps(defaults | arguments, default=str))
    return CachePlan.build(replace(header, policy=policy, arguments=recorded), sites, actions)


def _refuse_other_circumstances(stats: CalibrationStats, model: nn.Module | None, scheduler: Any, steps: int | None) -> None:
    """What is given beside statistics must be what they were measured on."""
    if model is not None:
        refuse_other_model(stats.header, model)
    if steps is not None and steps != stats.header.steps:
        raise PlanError(f"the statistics are of {stats.header.steps} steps, asked for are {steps}; calibrate for that number")
    if scheduler is not None:
        refuse_other_schedule(stats.header, prepare_scheduler(scheduler, stats.header.steps), "the given scheduler")


def _services(
    header: PlanHeader, stats: CalibrationStats | None, model: nn.Module | None, scheduler: Any
) -> dict[str, Callable[..., Any]]:
    """What a policy may ask for that runs the model, by the name of its parameter: policies themselves see no graphs."""

    def train(file: str | None, preset: str, changes: Mapping[str, Any]) -> Router:
        if file is not None:
            router = Router.load(file)
            router.refuse_other(header, str(file))
            return router
        if model is None or scheduler is None:
            raise PlanError(
                "routers are trained on the model: pass model= and scheduler=, or router= with a file of trained ones"
            )
        return train_router(model, scheduler, steps=header.steps, settings=settings_of(preset, changes))

    def again(reused: torch.Tensor) -> CalibrationStats:
        assert model is not None
        samples, seed = header.samples or 1, header.seed or 0
        return calibrate(model, scheduler, steps=header.steps, samples=samples, seed=seed, provisional=reused)

    measurable = stats is not None and model is not None and scheduler is not None
    return {"train": train} | ({"again": again} if measurable else {})


def _parameters_of(policy: str) -> dict[str, inspect.Parameter]:
    """A policy's keyword parameters: its arguments and the services it asks for."""
    parameters = inspect.signature(POLICIES[policy].decide).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _arguments_of(policy: str) -> dict[str, inspect.Parameter]:
    """A policy's own arguments by name."""
    return {name: p for name, p in _parameters_of(policy).items() if name not in SERVICES}


def _refuse_other_arguments(policy: str, arguments: Mapping[str, Any]) -> None:
    own = _arguments_of(policy)
    takes = f"it takes {', '.join(own)}" if own else "it takes none"
    unknown = sorted(set(arguments) - set(own))
    if unknown:
        raise PlanError(f"the policy {policy!r} has no argument {unknown[0]!r}; {takes}")
    missing = [name for name, p in own.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise PlanError(f"the policy {policy!r} needs the argument {missing[0]!r}; {takes}")
