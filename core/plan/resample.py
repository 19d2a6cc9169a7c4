"""Resampling a plan to another number of steps (`CachePlan.resample`)."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

from stepgraph.checks import check_whole
from stepgraph.errors import ArgumentError, MismatchError
from stepgraph.fingerprint import config_of, hash_config
from stepgraph.plan.header import PlanHeader
from stepgraph.plan.plan import CachePlan
from stepgraph.plan.site import COMPUTE, DEAD, Site, canonical
from stepgraph.scheduler import prepare_scheduler


def resample_plan(plan: CachePlan, steps: int, scheduler: Any = None) -> CachePlan:
    """The plan's pattern at another number of steps.

    Sites are taken from the last to the first, since a reused stream value (`output`, `hidden`, a block) makes what lies before
    it DEAD and so decides which rows count for it. A site that computes K of the plan's T rows computes
    S = max(1, floor(K T' / T + 1/2)) of the new T'. Its q-th computed row lies at the same relative position among the rows
    in which it is live as the old plan's (q K / S)-th, linearly interpolated between computed rows; so a period stays a
    period in steps, and dense and sparse stretches stay where they were in the run. The first live row computes, and the last
    one does where it did before. A row that does not compute takes the letter of the nearest old row that does not. Sites
    with equal columns (the outputs of a joint attention) keep equal columns, and the same number of steps gives the same rows.

    Forecasts do not come along: their coefficients are of the old timesteps.

    A site that the old plan refreshes right after every reused step that it is DEAD in, as InvarDiff does, keeps that: where a
    refresh is missing, the nearest other computed row moves there, as far as there are any.

    Args:
        plan: The plan.
        steps: The number of inference steps wanted.
        scheduler: The plan's scheduler, as diffusers makes it; copied, and set to `steps` for the new timesteps. Without it the
            timesteps are interpolated linearly between the plan's own, and sampling with the plan is refused unless the
            scheduler's happen to agree.

    Returns:
        A plan with the origin's policy and arguments and the argument `resampled_from`, the origin's T. The plan itself where
        nothing changes.

    Raises:
        PlanError: `steps` is no whole number of at least 1; another scheduler than the plan's; or no scheduler where there are
            more evaluations than steps (Heun), whose number only the scheduler knows.

    Warns:
        UserWarning: What comes out was not calibrated for the new schedule.
    """
    header = _resampled_header(plan.header, steps, scheduler)
    if (header.steps, header.timesteps) == (plan.header.steps, plan.header.timesteps):
        return plan
    rows = _resampled_rows(plan, len(header.timesteps))
    warnings.warn(
        f"the plan was made for {plan.header.steps} steps and is resampled to {steps}: its pattern is stretched, not measured; "
        f"calibrate for {steps} steps and make the plan again where quality matters"
        + ("; its forecasts were of other steps: give it new ones with stepgraph.forecast" if plan.forecasts else ""),
        stacklevel=4,
    )
    return CachePlan(header, plan.sites, rows, increments=plan.increments)


def _resampled_header(header: PlanHeader, steps: int, scheduler: Any) -> PlanHeader:
    """The header for `steps` inference steps."""
    check_whole("steps", steps, 1)
    schedule = header.schedule
    if schedule.begin or (scheduler is not None and (schedule.sigmas or schedule.timesteps)):
        raise ArgumentError(
            f"the plan's schedule has {schedule}, which says nothing of {steps} steps; resample a plan of the scheduler's own "
            f"schedule, or make one with schedule= of that length"
        )
    timesteps = _interpolated(header, steps) if scheduler is None else _set_timesteps(header, steps, scheduler)
    origin = {"resampled_from": header.arguments.get("resampled_from", len(header.timesteps))}
    shift_alone = replace(schedule, sigmas=(), timesteps=())
    arguments = {**header.arguments, **origin}
    return replace(header, steps=steps, timesteps=timesteps, arguments=arguments, schedule=shift_alone)


def _set_timesteps(header: PlanHeader, steps: int, scheduler: Any) -> tuple[float, ...]:
    """The timesteps of a copy of the plan's scheduler that is set to `steps`."""
    actual, wanted = (type(scheduler).__name__, hash_config(config_of(scheduler))), (header.scheduler, header.scheduler_hash)
    if actual != wanted:
        raise MismatchError(
            f"the plan is for {wanted[0]} (configuration {wanted[1]}), the given scheduler is {actual[0]} ({actual[1]}); "
            f"resampling changes the number of steps only: pass the plan's own scheduler, or make a plan for the other one"
        )
    return tuple(float(t) for t in prepare_scheduler(scheduler, steps, schedule=header.schedule).timesteps)


def _interpolated(header: PlanHeader, steps: int) -> tuple[float, ...]:
    """`steps` timesteps between the plan's first and last."""
    old = header.timesteps
    if len(old) != header.steps:
        raise ArgumentError(
            f"{header.scheduler} evaluates the model {len(old)} times in {header.steps} steps; pass scheduler= to resample, "
            f"since only it knows how many evaluations {steps} steps take"
        )
    places = [Fraction(s * (len(old) - 1), max(1, steps - 1)) for s in range(steps)]
    return tuple(old[int(x)] + float(x - int(x)) * (old[min(int(x) + 1, len(old) - 1)] - old[int(x)]) for x in places)


def _resampled_rows(plan: CachePlan, steps: int) -> tuple[str, ...]:
    """The rows of the resampled plan, in canonical form."""
    is_live = _liveness(plan.sites)
    # What is decided so far of every new row: the letters of the sites from the one at hand to the last.
    rows = [""] * steps
    for i in reversed(range(len(plan.sites))):
        was_live = [step for step, row in enumerate(plan.rows) if row[i] != DEAD]
        old = "".join(plan.rows[step][i] for step in was_live)
        live = [step for step in range(steps) if is_live(rows[step])]
        computed = min(len(live), max(1, _rounded(Fraction(old.count(COMPUTE) * steps, plan.steps))))
        refreshed = all(old[place] == COMPUTE for place in _after_gaps(was_live))
        stretched = resampled_letters(old, len(live), computed, _after_gaps(live) if refreshed else ())
        letters = dict(zip(live, stretched, strict=True))
        rows = [letters.get(step, DEAD) + row for step, row in enumerate(rows)]
    return tuple(rows)


def _liveness(sites: Sequence[Site]) -> Callable[[str], bool]:
    """From the letters of the last sites of a row: whether the site before them is live."""

    @cache
    def is_live(decided: str) -> bool:
        before = len(sites) - len(decided)
        return canonical(sites, COMPUTE * before + decided)[before - 1] != DEAD

    return is_live


def _after_gaps(live: Sequence[int]) -> list[int]:
    """Places in `live`, a site's live rows, that a row in which it is DEAD lies right before."""
    return [place for place in range(1, len(live)) if live[place] != live[place - 1] + 1]


def resampled_letters(old: str, length: int, computed: int, refreshes: Sequence[int] = ()) -> str:
    """One site's letters over its live rows, stretched to `length` rows of which `computed` compute.

    Args:
        old: The letters of the old plan's live rows, at least one of them; the first is COMPUTE.
        length: Number of live rows in the new plan.
        computed: How many of them compute, 1..length.
        refreshes: Rows, besides the first, that are to be among the computed ones.
    """
    places = _stretched([s for s, letter in enumerate(old) if letter == COMPUTE], len(old), length, computed)
    for row in refreshes:
        spare = places - {0, *refreshes}
        if row not in places and spare:
            places = places - {min(spare, key=lambda place: (abs(place - row), place))} | {row}
    others = [s for s, letter in enumerate(old) if letter != COMPUTE]
    scale = Fraction(len(old), length)

    def letter(row: int) -> str:
        if row in places or not others:
            return COMPUTE
        centre = (row + Fraction(1, 2)) * scale - Fraction(1, 2)
        return old[min(others, key=lambda s: abs(s - centre))]

    return "".join(letter(row) for row in range(length))


def _stretched(places: Sequence[int], old: int, length: int, computed: int) -> set[int]:
    """The computed rows 0..length-1, from those of `old` rows, which lie at `places`."""
    ends = [*places, old]
    rows: list[int] = []
    for q in range(computed):
        index = Fraction(q * len(places), computed)
        before = int(index)
        position = ends[before] + (index - before) * (ends[before + 1] - ends[before])
        wanted = int(position * Fraction(length, old))
        # Each has a row of its own, and leaves one to each that follows.
        earliest = rows[-1] + 1 if rows else 0
        rows.append(min(max(wanted, earliest), length - (computed - q)))
    if places[-1] == old - 1 and computed > 1:
        rows[-1] = length - 1
    return set(rows)


def _rounded(value: Fraction) -> int:
    """The nearest whole number; halves go up."""
    return int(value + Fraction(1, 2))
