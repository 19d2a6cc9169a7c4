"""InvarDiff: reuse what moves less in the next step than in this one (arXiv 2512.05134)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stepgraph.compiler.policies.policy import Policy
from stepgraph.plan import PlanError, Site

METRICS: dict[str, Callable[[Any], torch.Tensor]] = {
    "v1": lambda stats: stats.rate,
    "lagged": lambda stats: stats.relative[0],
}


def invardiff(
    sites: Sequence[Site],
    steps: int,
    stats: Any,
    *,
    step: float = 0.61,
    attn: float = 0.20,
    ff: float = 0.20,
    nonskip: float = 0.0,
    metric: str = "v1",
    phase2: bool | None = None,
    again: Callable[[torch.Tensor], Any] | None = None,
) -> Mapping[str, str]:
    """Reuse where the rate of change lies below a quantile, as the method's DiT code does.

    A value at step s is reused where rate[s] < quantile(rate[1 : T-1], tau): strictly below, with linear interpolation, over
    steps for the step gate (site `hidden`, fresh output head) and over steps and layers together for each module kind. So the
    number of hits follows from tau, and a LOWER tau reuses LESS. The first max(1, int(nonskip * T)) steps and the last one are
    computed. After a reused step all modules are computed once.

    Args:
        sites: The model's sites.
        steps: T.
        stats: Calibration.
        step (quantile, 0..1): Tau of the step gate.
        attn (quantile, 0..1): Tau of all attention modules together.
        ff (quantile, 0..1): Tau of all feed-forward modules together.
        nonskip (share of the steps, 0..1): The first steps that are computed.
        metric: "v1", the paper's rate, or "lagged": the relative error that a reuse really makes.
        phase2: Measure the rates once more with the reference held over runs of hits, and apply the quantiles again. The
            number of hits stays; they are spread differently. It does not run the cache. On unless given, for metric "v1".
        again: Runs that measurement: provisional reuses [T, sites] bool -> stats. `make_plan` supplies it from the model.

    Raises:
        PlanError: A quantile outside 0..1, an unknown metric, or phase 2 without a model.
    """
    taus = {"hidden": step, "attn": attn, "ff": ff}
    for name, tau in {**taus, "nonskip": nonskip}.items():
        if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau <= 1:
            raise PlanError(f"{'step' if name == 'hidden' else name} is {tau!r}; expected a number in 0..1")
    if not isinstance(metric, str) or metric not in METRICS:
        raise PlanError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    if steps < 3:
        raise PlanError(f"InvarDiff compares three steps in a row; this schedule has {steps}")
    reused = _below_quantiles(METRICS[metric](stats), sites, taus, nonskip)
    if phase2 not in (None, True, False) or (phase2 and metric != "v1"):
        raise PlanError(f"phase2 is {phase2!r} with metric {metric!r}; it is true or false, and measures v1")
    if metric == "v1" and phase2 in (None, True):
        if again is None:
            raise PlanError("phase 2 measures the model once more: pass model= and scheduler=, or phase2=False")
        reused = _below_quantiles(METRICS[metric](again(reused)), sites, taus, nonskip)
    reused = _step_first(reused, sites)
    return {
        site.name: "".join("CR"[hit] for hit in reused[:, i].int().tolist())
        for i, site in enumerate(sites)
        if site.kind in taus
    }


def _below_quantiles(rate: torch.Tensor, sites: Sequence[Site], taus: Mapping[str, float], nonskip: float) -> torch.Tensor:
    """[T, sites] bool: where the rate lies strictly below its kind's quantile, ends protected."""
    reused = torch.zeros(rate.shape, dtype=torch.bool)
    for kind, tau in taus.items():
        columns = [i for i, site in enumerate(sites) if site.kind == kind]
        if columns:
            own = rate[:, columns]
            reused[:, columns] = own < torch.quantile(own[1:-1].flatten(), tau)
    reused[: max(1, int(nonskip * len(rate)))] = False
    reused[-1] = False
    return reused


def _step_first(reused: torch.Tensor, sites: Sequence[Site]) -> torch.Tensor:
    """A reused step reuses every module, and the step after it refreshes them all, unless it is reused itself."""
    hidden = next(i for i, site in enumerate(sites) if site.kind == "hidden")
    modules = [i for i, site in enumerate(sites) if site.kind in ("attn", "ff")]
    result = reused.clone()
    for step in range(len(reused)):
        if reused[step, hidden]:
            result[step, modules] = True
            if step + 1 < len(reused):
                result[step + 1, modules] = False
    return result


INVARDIFF = Policy(invardiff, source="InvarDiff, arXiv 2512.05134", needs_stats=True)
