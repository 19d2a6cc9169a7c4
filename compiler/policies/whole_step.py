"""The fitted whole-step rule: between computed steps the model is a fitted combination of its past outputs and inputs."""

from collections.abc import Callable, Sequence
from typing import Any

from stepgraph.checks import check_whole
from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.errors import ArgumentError, PlanError
from stepgraph.plan import COMPUTE, REUSE, CachePlan, Site


def whole_step(
    sites: Sequence[Site],
    steps: int,
    stats: Any = None,
    *,
    every: int = 2,
    offset: int = 0,
    samples: int = 16,
    seed: int = 0,
    guidance_scale: float = 1.0,
    fit: Callable[..., CachePlan] | None = None,
) -> CachePlan:
    """Compute step 0 and every step s with (s - offset) divisible by `every`; at all others four fitted scalars stand in.

    Args:
        sites: The model's sites.
        steps: T.
        stats: Not used.
        every (steps, at least 2): The period.
        offset (steps, at least 0): Shifts the computed steps.
        samples: Sampling runs that the scalars are fitted on.
        seed: Of their noise.
        guidance_scale: Above 1, those runs have classifier-free guidance.
        fit: Makes the plan: (sites, actions, **settings) -> plan. `make_plan` supplies it from the model.

    Raises:
        PlanError: An argument is out of range, there is no model, or its output is no site.
    """
    check_whole("every", every, 2)
    check_whole("offset", offset, 0)
    if fit is None:
        raise ArgumentError(
            "the policy 'whole-step' runs the model: make its plan with make_plan(..., model=, scheduler=, steps=)"
        )
    if "output" not in {site.kind for site in sites}:
        raise PlanError("the model has no site `output`: it returns more than one tensor")
    letters = "".join(COMPUTE if s == 0 or (s - offset) % every == 0 else REUSE for s in range(steps))
    return fit(sites, {"output": letters}, samples=samples, seed=seed, guidance_scale=guidance_scale)


WHOLE_STEP = Policy(whole_step, source="stepgraph's own", measures=True)
