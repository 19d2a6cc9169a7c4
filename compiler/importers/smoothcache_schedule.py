"""SmoothCache's schedules (Roblox/SmoothCache): lists of T flags; 1 means compute.

Two forms are about. The published schedules for DiT call their lists "attn" and "mlp", for all blocks or, as "attn-3", for one.
What `CalibrationHelper` writes calls them as the block's children are called ("attn1", "attn2", "ff"), for all blocks, and
names only those that were wrapped. What a schedule does not name is computed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepgraph.compiler.interfaces.importer import (
    Importer,
    check_table,
    letters,
    refuse_more_than_reuse,
    refuse_other_kinds,
)
from stepgraph.errors import MismatchError
from stepgraph.plan import COMPUTE, MODULE_KINDS, CachePlan, Site

KINDS = {"attn": "attn", "mlp": "ff"}
KEY = re.compile(r"(attn|attn1|attn2|mlp|ff|ff_context)(?:-(0|[1-9][0-9]*))?")


def recognizes(data: Any) -> bool:
    """An object all of whose keys are "attn", "mlp" or a block's child such as "attn1", with or without "-<block>"."""
    return isinstance(data, dict) and bool(data) and all(isinstance(key, str) and KEY.fullmatch(key) for key in data)


def actions(data: Mapping[str, Any], sites: Sequence[Site], steps: int) -> Mapping[str, str]:
    """The schedule's reuses by site."""
    by_site: dict[str, str] = {}
    for key, flags in data.items():
        name, block = KEY.fullmatch(key).groups()  # type: ignore[union-attr]  # `recognizes` has matched every key
        reused = letters([not flag for flag in check_table(key, flags, steps)])
        modules = _modules(sites, key, name)
        if block is not None and int(block) >= len(modules):
            raise MismatchError(f"{key} names block {block}; this model has {len(modules)} blocks")
        for module in modules if block is None else [modules[int(block)]]:
            by_module = {site.name: reused for site in module}
            twice = [site for site, actions_before in by_site.items() if by_module.get(site, actions_before) != actions_before]
            if twice:
                raise MismatchError(f"{key} says of {twice[0]} what another key says otherwise; leave one of them out")
            by_site |= by_module
    return by_site


def _modules(sites: Sequence[Site], key: str, name: str) -> list[list[Site]]:
    """The modules that a name stands for, in model order, each with the sites of its calls.

    Raises:
        PlanError: The model has none.
    """
    present = [site for site in sites if site.kind in MODULE_KINDS]
    paths = list(dict.fromkeys(site.path for site in present if site.path.rpartition(".")[2] == name))
    if not paths and name in KINDS:
        paths = list(dict.fromkeys(site.path for site in present if site.kind == KINDS[name]))
    if not paths:
        children = sorted({site.path.rpartition(".")[2] for site in present})
        raise MismatchError(f"{key} names {name}; the blocks of this model have {', '.join(children)}")
    return [[site for site in present if site.path == path] for path in paths]


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
