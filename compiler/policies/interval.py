"""FORA: compute every N-th step, reuse between (arXiv 2407.01425)."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepgraph.compiler.policies.policy import Policy, per_kind, present_kinds
from stepgraph.plan import COMPUTE, MODULE_KINDS, REUSE, PlanError, Site


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
    present = present_kinds(sites)
    if isinstance(kinds, str):
        raise PlanError(f"kinds is {kinds!r}; expected a list, such as [{kinds!r}]")
    chosen = list(kinds) if kinds is not None else [kind for kind in present if kind in MODULE_KINDS]
    named = {*chosen, *(every if isinstance(every, Mapping) else ()), *(offset if isinstance(offset, Mapping) else ())}
    unknown = sorted(named - set(present))
    if unknown:
        raise PlanError(f"unknown kind {unknown[0]!r}; this model has {', '.join(present)}")
    actions = {}
    for kind in chosen:
        period, shift = per_kind(every, kind, 1), per_kind(offset, kind, 0)
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise PlanError(f"every is {period!r} for {kind}; expected a whole number of at least 1")
        if isinstance(shift, bool) or not isinstance(shift, int) or shift < 0:
            raise PlanError(f"offset is {shift!r} for {kind}; expected a whole number of at least 0")
        actions[kind] = "".join(COMPUTE if s == 0 or (s - shift) % period == 0 else REUSE for s in range(steps))
    return actions


INTERVAL = Policy(interval, source="FORA, arXiv 2407.01425")
