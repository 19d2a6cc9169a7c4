"""Correctors that need no model: from a plan to one in which something better stands in for reused values."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stepgraph.checked import checked
from stepgraph.checks import check_whole
from stepgraph.compiler.forecast.forecasts import HIGHEST, RULES
from stepgraph.errors import ArgumentError, PlanError
from stepgraph.plan import (
    COMPUTE,
    DEAD,
    FORECAST,
    LOWRANK,
    MODULE_KINDS,
    READS_STORED,
    REUSE,
    CachePlan,
    canonical,
    containers,
    joint_calls,
)
from stepgraph.plan.corrections import Forecast


@checked
def forecast(
    plan: CachePlan,
    rule: str = "taylor",
    order: int = 1,
    *,
    kinds: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    around: bool = False,
) -> CachePlan:
    """Forecast what a plan reuses, by a formula over its timesteps (`stepgraph.compiler.forecast.forecasts`).

    Every REUSE becomes a FORECAST, and every FORECAST without coefficients gets them. Where fewer values are stored than the
    order needs, the highest order that they allow is taken; those steps are listed in the plan's arguments, under
    "corrections", as `fallbacks`. Of values stored at one and the same timestep (Heun evaluates twice) the newest counts.

    Args:
        plan: The plan.
        rule: "taylor" (TaylorSeer), "polynomial" or "adams_bashforth".
        order: 0 (the last value) to 4.
        kinds: Kinds of the sites that are changed; all unless given.
        sites: Their names, likewise.
        around: Give every LOWRANK without one such a forecast too, around which its increment is then taken.

    Raises:
        PlanError: An unknown rule, kind or site, an order out of range, or nothing to forecast.
    """
    if rule not in RULES:
        raise ArgumentError(f"unknown rule {rule!r} of forecasts; known: {', '.join(RULES)}")
    check_whole("the order", order, 0, HIGHEST)
    letters = (REUSE, FORECAST, LOWRANK) if around else (REUSE, FORECAST)
    cells = [cell for cell in find_cells(plan, letters, kinds, sites) if cell not in plan.forecasts]
    if not cells:
        raise PlanError(f"nothing to forecast: the chosen sites are nowhere {' or '.join(letters)} without a forecast")
    by_cell, fallbacks = {}, dict[str, int]()
    for step, i in cells:
        # A joint attention's linear maps are kept with its first output.
        if plan.rows[step][i] == LOWRANK and plan.sites[i].output:
            continue
        ages, times = distinct_times(plan, step, i)
        reached = min(order, len(ages) - 1)
        if reached < order:
            fallbacks[str(step)] = min(reached, fallbacks.get(str(step), order))
        weights = RULES[rule](times, plan.header.timesteps[step], reached)
        terms = tuple(f"y{age}" for age in ages[: reached + 1])
        by_cell[step, i] = Forecast(terms, (tuple(weights),) * len(plan.header.branches))
    changed = {cell: FORECAST for cell in cells if plan.rows[cell[0]][cell[1]] == REUSE}
    record = {"by": "forecast", "rule": rule, "order": order, "around": around, "fallbacks": fallbacks}
    return with_cells(plan, changed, by_cell, record | chosen(kinds, sites))


@checked
def lowrank(
    plan: CachePlan,
    *,
    kinds: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    around: str | None = None,
    order: int | None = None,
) -> CachePlan:
    """Correct reused modules by low-rank increments: every REUSE of a module becomes LOWRANK.

    Outputs of a joint attention change together. What was DEAD inside a `proj_out` that is run again becomes LOWRANK where its
    kind is chosen and something is stored to correct, else COMPUTE.

    Args:
        plan: The plan; compiling the result takes `factors`.
        kinds: Kinds of the sites that are changed; all kinds of modules unless given.
        sites: Their names, likewise.
        around: Rule of a forecast around which the increments are taken, as `forecast` knows it; the last stored value unless
            given.
        order: Of that forecast, 0 to 4; 1 unless given.

    Raises:
        PlanError: An unknown kind, site or rule, a kind or site that is no module's, an order out of range or without `around`,
            or nothing that is reused.
    """
    if order is not None and around is None:
        raise ArgumentError(
            f"order is {order!r}, but no forecast to take increments around; pass around= too, or leave out order"
        )
    present = [kind for kind in dict.fromkeys(site.kind for site in plan.sites) if kind in MODULE_KINDS]
    indices = set(find_sites(plan, present if kinds is None and sites is None else kinds, sites))
    streams = [plan.sites[i] for i in sorted(indices) if plan.sites[i].kind not in MODULE_KINDS]
    if streams:
        name = streams[0].kind if streams[0].kind in (kinds or ()) else streams[0].name
        raise ArgumentError(f"{name} is no module, and has no linear maps to correct; this model's modules: {present}")
    changed: dict[tuple[int, int], str] = {}
    for step, row in enumerate(plan.rows):
        corrected = {i for i in indices if row[i] == REUSE}
        for members in joint_calls(plan.sites):
            corrected |= {i for i in members if corrected & set(members) and row[i] in READS_STORED}
        letters = ["L" if i in corrected else letter for i, letter in enumerate(row)]
        inside = containers(plan.sites, "".join(letters))
        for i, letter in enumerate(row):
            if letter == DEAD and i not in inside:
                stored = any(earlier[i] == COMPUTE for earlier in plan.rows[:step])
                changed[step, i] = LOWRANK if i in indices and stored else COMPUTE
        changed |= dict.fromkeys(((step, i) for i in corrected), LOWRANK)
    if LOWRANK not in changed.values():
        raise PlanError("nothing to correct: none of the chosen modules is reused at any step")
    dropped = {cell for cell in plan.forecasts if changed.get(cell) == LOWRANK}
    without_dropped = replace(plan, forecasts={cell: f for cell, f in plan.forecasts.items() if cell not in dropped})
    corrected_plan = with_cells(without_dropped, changed, {}, {"by": "lowrank"} | chosen(kinds, sites))
    if around is None:
        return corrected_plan
    return forecast(
        corrected_plan, around, 1 if order is None else order, sites=[plan.sites[i].name for i in sorted(indices)], around=True
    )


def find_sites(plan: CachePlan, kinds: Sequence[str] | None, sites: Sequence[str] | None) -> list[int]:
    """Indices of the sites of some kinds or names; all where neither is given.

    Raises:
        PlanError: A kind or site that the plan does not have.
    """
    for name, asked in (("kinds", kinds), ("sites", sites)):
        if isinstance(asked, str) or (asked is not None and not all(isinstance(entry, str) for entry in asked)):
            raise ArgumentError(f"{name} is {asked!r}; expected a list of names")
    present = {site.kind for site in plan.sites}
    unknown = sorted(set(kinds or ()) - present)
    if unknown:
        raise ArgumentError(
            f"unknown kind {unknown[0]!r}; this model has {', '.join(dict.fromkeys(s.kind for s in plan.sites))}"
        )
    named = {plan.index(name) for name in sites or ()}
    every = kinds is None and sites is None
    return [i for i, site in enumerate(plan.sites) if every or site.kind in (kinds or ()) or i in named]


def find_cells(
    plan: CachePlan, letters: Collection[str], kinds: Sequence[str] | None, sites: Sequence[str] | None
) -> list[tuple[int, int]]:
    """(step, site index) of the chosen sites' actions that are one of `letters`."""
    indices = find_sites(plan, kinds, sites)
    return [(step, i) for step, row in enumerate(plan.rows) for i in indices if row[i] in letters]


def distinct_times(plan: CachePlan, step: int, i: int) -> tuple[list[int], list[float]]:
    """Ages and timesteps of the values that a site has stored before a step, the newest first, one of each timestep."""
    stored = [s for s in range(step - 1, -1, -1) if plan.rows[s][i] == COMPUTE]
    newest: dict[float, int] = {}
    for age, s in enumerate(stored, start=1):
        newest.setdefault(plan.header.timesteps[s], age)
    return list(newest.values()), list(newest)


def chosen(kinds: Sequence[str] | None, sites: Sequence[str] | None) -> dict[str, list[str]]:
    """What was asked for, for a record."""
    return {name: list(values) for name, values in (("kinds", kinds), ("sites", sites)) if values is not None}


def with_cells(
    plan: CachePlan,
    letters: Mapping[tuple[int, int], str],
    forecasts: Mapping[tuple[int, int], Forecast],
    record: Mapping[str, Any],
    **header: Any,
) -> CachePlan:
    """The plan with some actions and forecasts changed, and a record of that at the end of its argument "corrections"."""
    rows = [list(row) for row in plan.rows]
    for (step, i), letter in letters.items():
        rows[step][i] = letter
    done = [*plan.header.arguments.get("corrections", []), dict(record)]
    changes = {"arguments": {**plan.header.arguments, "corrections": done}, **header}
    return replace(
        plan,
        header=replace(plan.header, **changes),
        rows=tuple(canonical(plan.sites, "".join(row)) for row in rows),
        forecasts={**plan.forecasts, **forecasts},
    )
