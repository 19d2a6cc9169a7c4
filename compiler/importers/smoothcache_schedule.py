"""SmoothCache's schedules (Roblox/SmoothCache): one list of T flags per module kind or per module; 1 means compute."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepgraph.compiler.interfaces.importer import (
    Importer,
    check_table,
    letters,
    refuse_more_than_reuse,
    refuse_other_kinds,
    sites_of,
)
from stepgraph.errors import MismatchError
from stepgraph.plan import COMPUTE, CachePlan, Site

KINDS = {"attn": "attn", "mlp": "ff"}
KEY = re.compile(r"(attn|mlp)(?:-(0|[1-9][0-9]*))?")


def recognizes(data: Any) -> bool:
    """An object all of whose keys are "attn", "mlp", "attn-<block>" or "mlp-<block>"."""
    return isinstance(data, dict) and bool(data) and all(isinstance(key, str) and KEY.fullmatch(key) for key in data)


def actions(data: Mapping[str, Any], sites: Sequence[Site], steps: int) -> Mapping[str, str]:
    """The schedule's reuses by kind or site."""
    refuse_other_kinds("a SmoothCache schedule", sites, set(KINDS.values()))
    by_site = {}
    for key, flags in data.items():
        name, block = KEY.fullmatch(key).groups()  # type: ignore[union-attr]  # `recognizes` has matched every key
        reused = letters([not flag for flag in check_table(key, flags, steps)])
        sites_of_kind = sites_of(sites, KINDS[name])
        if block is None:
            by_site[KINDS[name]] = reused
        elif int(block) < len(sites_of_kind):
            by_site[sites_of_kind[int(block)].name] = reused
        else:
            raise MismatchError(f"{key} names block {block}; this model has {len(sites_of_kind)} blocks")
    missing = [name for name in KINDS if not any(key.partition("-")[0] == name for key in data)]
    numbered = [key for key in data if "-" in key]
    expected = sum(len(sites_of(sites, kind)) for kind in KINDS.values())
    if missing or (numbered and len(numbered) != expected):
        raise MismatchError(
            f"the schedule has {len(data)} entries; expected attn and mlp, or one for each of {expected} modules"
        )
    return by_site


def export(plan: CachePlan) -> dict[str, list[int]]:
    """A plan as a schedule with one entry per module.

    Raises:
        PlanError: The plan does something that a schedule cannot say.
    """
    refuse_other_kinds("a schedule", plan.sites, set(KINDS.values()))
    refuse_more_than_reuse("a schedule", plan, set(KINDS.values()))
    schedule = {}
    rank = dict.fromkeys(KINDS.values(), 0)
    names = {kind: name for name, kind in KINDS.items()}
    for i, site in enumerate(plan.sites):
        if site.kind in names:
            schedule[f"{names[site.kind]}-{rank[site.kind]}"] = [int(row[i] == COMPUTE) for row in plan.rows]
            rank[site.kind] += 1
    return schedule


SMOOTHCACHE_SCHEDULE = Importer(recognizes, actions, source="SmoothCache schedule, arXiv 2411.10510")
