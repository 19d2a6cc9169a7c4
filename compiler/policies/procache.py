"""ProCache's step level: a budget of full steps, at intervals that only shrink (constrained monotone schedules)."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepgraph.checks import check_whole
from stepgraph.compiler.interfaces.policy import Policy, chosen_kinds
from stepgraph.errors import ArgumentError
from stepgraph.plan import COMPUTE, REUSE, Site


def procache(
    sites: Sequence[Site],
    steps: int,
    stats: Any,
    *,
    budget: int | None = None,
    shortest: int = 1,
    longest: int = 5,
    candidates: int = 5,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
) -> Mapping[str, str]:
    """Of some random monotone schedules with a budget of full steps, the one with the smallest predicted error.

    A schedule cuts the run into `budget` segments, each a full step and the reuses behind it; their lengths lie between
    `shortest` and `longest`, sum to T, and are sorted from long to short, since early steps are said to bear more reuse. The
    method ranks its candidates by FID over a thousand images; here each is ranked by what calibration measured: the mean over
    modules and reused steps of the relative difference between the value and the one it would be replaced by. Its selective
    recomputation of tokens within reused steps depends on data and is left out.

    Args:
        sites: The model's sites.
        steps: T.
        stats: Calibration.
        budget (steps): Number of full steps; a third of the steps unless given.
        shortest (steps, at least 1): Length of the shortest segment.
        longest (steps): Length of the longest segment.
        candidates: Number of random schedules.
        seed: Of the random schedules.
        kinds: The kinds to reuse; all module kinds of the model unless given.

    Raises:
        PlanError: No schedule has such segments, or an argument is out of range.
    """
    chosen = chosen_kinds(kinds, sites)
    if not chosen:
        raise ArgumentError("kinds is []; expected at least one kind to reuse")
    budget = max(1, round(steps / 3)) if budget is None else budget
    for name, value in {"budget": budget, "shortest": shortest, "longest": longest, "candidates": candidates}.items():
        check_whole(name, value, 1)
    check_whole("seed", seed)
    if not budget * shortest <= steps <= budget * longest:
        raise ArgumentError(
            f"{budget} segments of {shortest}..{longest} steps hold {budget * shortest}..{budget * longest} steps, and this "
            f"schedule has {steps}; change budget, shortest or longest"
        )
    source = random.Random(seed)
    columns = [i for i, site in enumerate(sites) if site.kind in chosen]
    errors = stats.relative_mse[columns].sqrt().mean(0)  # [T, T]
    drawn = [_monotone(source, steps, budget, shortest, longest) for _ in range(candidates)]
    best = min(drawn, key=lambda lengths: _predicted(errors, lengths))
    letters = "".join(COMPUTE + REUSE * (length - 1) for length in best)
    return dict.fromkeys(chosen, letters)


def _monotone(source: random.Random, steps: int, budget: int, shortest: int, longest: int) -> list[int]:
    """Random lengths within the bounds that sum to `steps`, from long to short."""
    lengths, left = [], steps
    for more in range(budget - 1, -1, -1):
        low, high = max(shortest, left - more * longest), min(longest, left - more * shortest)
        lengths.append(source.randint(low, high))
        left -= lengths[-1]
    return sorted(lengths, reverse=True)


def _predicted(errors: torch.Tensor, lengths: Sequence[int]) -> float:
    """The sum of the errors of all reuses."""
    total, start = 0.0, 0
    for length in lengths:
        total += float(errors[start + 1 : start + length, start].sum())
        start += length
    return total


PROCACHE = Policy(procache, source="ProCache, arXiv 2512.17298 (step-level schedules)", needs_stats=True)
