"""A plan for the rest of its run (`CachePlan.tail`), as image to image takes it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from stepgraph.checks import check_whole
from stepgraph.errors import PlanError
from stepgraph.plan.corrections import Forecast
from stepgraph.plan.plan import CachePlan
from stepgraph.plan.site import COMPUTE, DEAD, READS_STORED, Site, containers, joint_calls


def tail_plan(plan: CachePlan, begin: int) -> CachePlan:
    """The plan of a run that begins at a step of the given one; what it would read that is not stored then is computed.

    Step begin + s does what the plan does there, but for sites that read more values than have been stored since the beginning:
    those are computed, with whatever lies inside them.

    Args:
        plan: The plan.
        begin: Its step with which the run begins, 0..T - 1.

    Raises:
        PlanError: `begin` is no step of the plan; or a forecast would read other stored values than those that its
            coefficients are for.
    """
    check_whole("begin", begin, 0, plan.steps - 1, tail=": a step of the plan")
    if not begin:
        return plan
    before: list[list[int]] = [[s for s in range(begin) if plan.rows[s][i] == COMPUTE] for i in range(len(plan.sites))]
    since: list[list[int]] = [[] for _ in plan.sites]
    rows, forecasts = [], {}
    for step in range(begin, plan.steps):
        here = {i: forecast for (s, i), forecast in plan.forecasts.items() if s == step}
        row = _row(plan.sites, plan.rows[step], [len(stored) for stored in since], here)
        for i, forecast in here.items():
            if row[i] in READS_STORED:
                _refuse_other_values(plan, step, i, before[i], since[i])
                forecasts[step - begin, i] = forecast
        for i, (planned, action) in enumerate(zip(plan.rows[step], row, strict=True)):
            if planned == COMPUTE:
                before[i].append(step)
            if action == COMPUTE:
                since[i].append(step)
        rows.append(row)
    schedule = replace(plan.header.schedule, begin=plan.header.schedule.begin + begin)
    header = replace(plan.header, timesteps=plan.header.timesteps[begin:], schedule=schedule)
    return CachePlan(header, plan.sites, tuple(rows), forecasts, plan.increments)


def _row(sites: Sequence[Site], row: str, stored: Sequence[int], forecasts: Mapping[int, Forecast]) -> str:
    """A row in which every site that reads more values than are stored is computed, and so is what that brings to life."""
    letters, joint = list(row), joint_calls(sites)

    def lacks(i: int) -> bool:
        oldest = max((*forecasts[i].ages, *forecasts[i].inputs)) if i in forecasts else 1
        return letters[i] in READS_STORED and stored[i] < oldest

    while True:
        inside = containers(sites, "".join(letters))
        wrong = {i for i in range(len(sites)) if i not in inside and (letters[i] == DEAD or lacks(i))}
        for members in joint:
            if any(letters[i] == COMPUTE or i in wrong for i in members):
                wrong |= {i for i in members if letters[i] in READS_STORED}
        if not wrong:
            return "".join(letters)
        for i in wrong:
            letters[i] = COMPUTE


def _refuse_other_values(plan: CachePlan, step: int, i: int, planned: Sequence[int], stored: Sequence[int]) -> None:
    """Refuse a forecast that reads values of other steps than in the whole plan.

    Args:
        plan: The whole plan.
        step: Of it.
        i: The site.
        planned: The steps that have stored the site's value in the whole plan.
        stored: Likewise in the tail.
    """
    forecast = plan.forecasts[step, i]
    ages = {age for age in (*forecast.ages, *forecast.inputs) if age}
    if any(planned[-age] != stored[-age] for age in ages):
        raise PlanError(
            f"step {step}, site {plan.sites[i].name}: the forecast's coefficients are for values of the steps "
            f"{sorted(planned[-age] for age in ages)}; a run that begins later would have those of "
            f"{sorted(stored[-age] for age in ages)}; make a plan for that run, with schedule={{'begin': ...}}"
        )
