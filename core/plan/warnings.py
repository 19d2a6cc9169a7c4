"""What users of a plan should know before they run it."""

from stepgraph.plan.plan import CachePlan
from stepgraph.plan.site import COMPUTE, DEAD, LOWRANK, REUSE

# Scheduler class -> the predictions under which its step is a straight line in the model's output, so that two steps with one
# output are one longer step. DDIM: x / sqrt(alpha) over sqrt(1 - alpha) / sqrt(alpha) for epsilon, x / sqrt(1 - alpha) over the
# inverse for sample; Euler and flow matching: x over sigma. A reused v-prediction means another direction at every step.
STRAIGHT = {
    "DDIMScheduler": ("epsilon", "sample"),
    "DDIMParallelScheduler": ("epsilon", "sample"),
    "EulerDiscreteScheduler": ("epsilon", "sample"),
    "FlowMatchEulerDiscreteScheduler": ("flow",),
}


def plan_warnings(plan: CachePlan) -> tuple[str, ...]:
    """One sentence or two for everything about a plan that its numbers do not show."""
    return tuple(filter(None, [_shorter_schedule(plan), _unfinished(plan)]))


def _unfinished(plan: CachePlan) -> str:
    """What the costs leave out while the plan has no factors."""
    unbound = {i for row in plan.rows for i, action in enumerate(row) if action == LOWRANK and not plan.sites[i].output}
    if unbound <= set(plan.increments):
        return ""
    return (
        "LOWRANK counts as a reuse of one value here: its real costs depend on the factors, which the plan is not bound to. "
        "`stepgraph compile` with --factors shows them."
    )


def _shorter_schedule(plan: CachePlan) -> str:
    """Whether reusing the output for whole steps is the same sampler in fewer steps, in other words no caching at all."""
    header = plan.header
    output = next((i for i, site in enumerate(plan.sites) if site.kind == "output"), None)
    computed = [step for step, row in enumerate(plan.rows) if output is None or row[output] != REUSE]
    straight = STRAIGHT.get(header.scheduler, ())
    if len(computed) == plan.steps or not straight or header.prediction not in ("", *straight):
        return ""
    prediction = header.prediction or f"{' or '.join(straight)} (which this plan does not record)"
    elsewhere = any(action not in (COMPUTE, DEAD) for step in computed for action in plan.rows[step])
    return (
        f"`output` is reused at {plan.steps - len(computed)} of {plan.steps} steps. Under {header.scheduler} with {prediction} "
        f"prediction, eta 0 and nothing clipped, that IS a shorter schedule: the same sampler on the {len(computed)} computed "
        f"timesteps ({_listed(plan, computed)}){'; what those steps reuse comes on top' if elsewhere else ''}. Compare it with "
        f"{header.scheduler} in {len(computed)} step{'s' if len(computed) > 1 else ''}, which costs the same, and not only "
        f"with all {plan.steps}."
    )


def _listed(plan: CachePlan, steps: list[int]) -> str:
    """The timesteps of some steps, the middle left out where there are many."""
    values = [f"{plan.header.timesteps[step]:g}" for step in steps]
    return ", ".join(values if len(values) <= 8 else [*values[:4], "...", *values[-2:]])
