"""SmoothCache: reuse for as long as the measured relative change stays small (arXiv 2411.10510)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepgraph.checks import check_flag, check_number
from stepgraph.compiler.interfaces.policy import Policy, per_kind, present_kinds
from stepgraph.errors import ArgumentError
from stepgraph.plan import COMPUTE, MODULE_KINDS, REUSE, Site


def smoothcache(
    sites: Sequence[Site], steps: int, stats: Any, *, alpha: float | Mapping[str, float] = 0.15, per_layer: bool = False
) -> Mapping[str, str]:
    """Greedy schedules: after a computed step, skip the largest k for which reusing over k steps changes at most `alpha`.

    The error of reusing at step s what was computed k steps before is ||Z_s - Z_(s-k)||_1 / ||Z_s||_1. The first and the last
    step are computed.

    Args:
        sites: The model's sites.
        steps: T.
        stats: Calibration; its lags bound k.
        alpha (relative L1 change, at least 0): Threshold for all module kinds, or by kind (then the others are computed).
        per_layer: One schedule for each module instead of one for all modules of a kind (their mean error).

    Raises:
        PlanError: A negative threshold, or one for a kind the model does not have.
    """
    present = [kind for kind in present_kinds(sites) if kind in MODULE_KINDS]
    unknown = sorted(set(alpha) - set(present)) if isinstance(alpha, Mapping) else []
    if unknown:
        raise ArgumentError(f"alpha is given for {unknown[0]!r}; this model has the module kinds {', '.join(present)}")
    check_flag("per_layer", per_layer)
    actions: dict[str, str] = {}
    for kind in present:
        threshold = per_kind(alpha, kind, 0.0)
        check_number("alpha", threshold, where=f" for {kind}")
        columns = [i for i, site in enumerate(sites) if site.kind == kind]
        errors = stats.relative[:, :, columns]
        if per_layer:
            actions |= {sites[i].name: _greedy(errors[:, :, n], steps, threshold) for n, i in enumerate(columns)}
        else:
            actions[kind] = _greedy(errors.mean(dim=2), steps, threshold)
    return actions


def _greedy(errors: torch.Tensor, steps: int, threshold: float) -> str:
    """Letters from errors [lags, T]."""
    letters, step = [], 0
    while step < steps:
        fits = [k for k in range(1, len(errors) + 1) if step + k <= steps - 2 and errors[k - 1, step + k] <= threshold]
        skipped = max(fits, default=0)
        letters += [COMPUTE] + [REUSE] * skipped
        step += 1 + skipped
    return "".join(letters)


SMOOTHCACHE = Policy(smoothcache, source="SmoothCache, arXiv 2411.10510", needs_stats=True)
