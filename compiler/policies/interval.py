"""FORA: compute every N-th step, reuse between (arXiv 2407.01425)."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepgraph.checks import check_whole
from stepgraph.compiler.interfaces.policy import Policy, chosen_kinds, per_kind, present_kinds
from stepgraph.errors import ArgumentError
from stepgraph.plan import COMPUTE, REUSE, Site


def interval(
    sites: Sequence[Site],
    steps: int,
    stats: Any = None,
    *,
    every: int | Mapping[str, int] = 2,
    offset: int | Mapping[str, int] = 0,
    kinds: Sequence[str] | None = None,
) -> Mapping[str, str]:
    """Compute step 0 and every step s with (s - offset) divisible by `every`; reuse at all others.

    Args:
        sites: The model's sites.
        steps: T.
        stats: Not used.
        every (steps, at least 1): The period N, for all kinds or by kind.
        offset (steps, at least 0): Shifts the computed steps, for all kinds or by kind. FORA's own code counts steps down to 0
            and computes those divisible by N, which is `offset=(T - 1) % N`.
        kinds: The kinds to reuse; all module kinds of the model unless given. `hidden`, `stack_residual` and `output`
            reuse whole steps.

    Raises:
        PlanError: A period below 1, a negative offset, or a kind the model does not have.
    """
    chosen, present = chosen_kinds(kinds, sites), present_kinds(sites)
    unknown = sorted({kind for setting in (every, offset) if isinstance(setting, Mapping) for kind in setting} - set(present))
    if unknown:
        raise ArgumentError(f"unknown kind {unknown[0]!r}; this model has {', '.join(present)}")
    actions = {}
    for kind in chosen:
        period, shift = per_kind(every, kind, 1), per_kind(offset, kind, 0)
        check_whole("every", period, 1, where=f" for {kind}")
        check_whole("offset", shift, 0, where=f" for {kind}")
        actions[kind] = "".join(COMPUTE if s == 0 or (s - shift) % period == 0 else REUSE for s in range(steps))
    return actions


INTERVAL = Policy(interval, source="FORA, arXiv 2407.01425")
