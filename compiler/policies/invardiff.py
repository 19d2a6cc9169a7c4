"""InvarDiff: reuse what moves less in the next step than in this one (arXiv 2512.05134)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stepgraph.checks import check_number
from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.errors import ArgumentError, PlanError
from stepgraph.plan import Site

PROTECT = ("both", "first", "none")
VARIANTS = ("auto", "dit", "flux")


def invardiff(
    sites: Sequence[Site],
    steps: int,
    stats: Any,
    *,
    step: float = 0.61,
    attn: float = 0.20,
    ff: float = 0.20,
    context_ff: float | None = None,
    single_attn: float | None = None,
    single_mlp: float | None = None,
    nonskip: float = 0.0,
    protect: str = "both",
    metric: str = "v1",
    phase2: bool | None = None,
    variant: str = "auto",
    again: Callable[[torch.Tensor], Any] | None = None,
) -> Mapping[str, str]:
    """Reuse where the rate of change lies below a quantile, as the method's code does.

    A value at step s is reused where rate[s] < quantile(rate[1 : T-1], tau): strictly below, with linear interpolation, over
    steps for the step gate (site `hidden`, fresh output head) and over steps and layers together for each module kind. So the
    number of hits follows from tau, and a LOWER tau reuses LESS. After a reused step all modules are computed once. The single
    blocks of FLUX have thresholds of their own; a joint attention is skipped only where both its outputs are hits.

    Args:
        sites: The model's sites.
        steps: T.
        stats: Calibration.
        step (quantile, 0..1): Tau of the step gate.
        attn (quantile, 0..1): Tau of the attention modules; of a joint attention's two outputs each has its own quantile.
        ff (quantile, 0..1): Tau of the feed-forward modules.
        context_ff (quantile, 0..1): Tau of the text stream's feed-forward modules; as `ff` unless given.
        single_attn (quantile, 0..1): Tau of the single blocks' attention; as `attn` unless given.
        single_mlp (quantile, 0..1): Tau of the single blocks' MLP; as `ff` unless given.
        nonskip (share of the steps, 0..1): The first steps that are computed: max(1, int(nonskip * T)) of them.
        protect: Which ends are computed whatever their rates: "both", "first" (the last step may be reused), or "none" (only
            step 0, which has nothing to reuse).
        metric: "v1", the paper's rate; "relative_l1", its later form; "lagged", the relative error that a reuse really makes;
            or the name of a metric that the calibration was given.
        phase2: Measure the rates once more with the reference held over runs of hits, and apply the quantiles again. The
            number of hits stays; they are spread differently. It does not run the cache. On unless given, but not for "lagged".
        variant: "dit" corrects the step gate in phase 2 too; "flux" keeps that of phase 1, and phase 2 starts from a plan that
            protects step 0 and the last step only; "auto" is "flux" for models with a joint attention.
        again: Runs that measurement: provisional reuses [T, sites] bool -> stats. `make_plan` supplies it.

    Raises:
        PlanError: A quantile outside 0..1, an unknown metric or alternative, or phase 2 without a model.
    """
    groups = _groups(sites)
    taus = _taus(groups, step, attn, ff, context_ff, single_attn, single_mlp)
    check_number("nonskip", nonskip, 0, 1)
    for name, value, known in (("protect", protect, PROTECT), ("variant", variant, VARIANTS)):
        if value not in known:
            raise ArgumentError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if protect == "none" and nonskip:
        raise ArgumentError(f"nonskip is {nonskip}, but protect='none' computes step 0 only; leave one of them out")
    if steps < 3:
        raise PlanError(f"InvarDiff compares three steps in a row; this schedule has {steps}")
    if phase2 not in (None, True, False) or (phase2 and metric == "lagged"):
        raise ArgumentError(
            f"phase2 is {phase2!r} with metric {metric!r}; it is true or false, and holds references, which lag none"
        )
    flux = variant == "flux" or (variant == "auto" and any(site.kind == "context_attn" for site in sites))
    first = 1 if protect == "none" else max(1, int(nonskip * steps))
    last = protect == "both"
    rate = stats.rate(metric)
    reused = _below_quantiles(rate, groups, taus, first, last)
    if phase2 or (phase2 is None and metric != "lagged"):
        assert again is not None
        provisional = _below_quantiles(rate, groups, taus, 1, last) if flux else reused
        corrected = _below_quantiles(again(provisional).rate(metric), groups, taus, first, last)
        if flux:
            corrected[:, groups["hidden"]] = reused[:, groups["hidden"]]
        reused = corrected
    reused = _step_first(reused, groups)
    return {
        sites[i].name: "".join("CR"[hit] for hit in reused[:, i].int().tolist()) for columns in groups.values() for i in columns
    }


def _groups(sites: Sequence[Site]) -> dict[str, list[int]]:
    """Columns that share a quantile: by kind, those of single blocks on their own."""
    groups: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        if site.kind in ("hidden", "attn", "context_attn", "ff", "context_ff", "mlp"):
            single = "single_" if site.path.startswith("single_") else ""
            groups.setdefault(single + site.kind, []).append(i)
    return groups


def _taus(
    groups: Mapping[str, list[int]],
    step: float,
    attn: float,
    ff: float,
    context_ff: float | None,
    single_attn: float | None,
    single_mlp: float | None,
) -> dict[str, float]:
    """The quantile of each group.

    Raises:
        PlanError: One is outside 0..1, or is given for modules that the model does not have.
    """
    optional = {"context_ff": context_ff, "single_attn": single_attn, "single_mlp": single_mlp}
    for name, value in optional.items():
        if value is not None and name not in groups:
            raise ArgumentError(f"{name} is {value!r}, but this model has no such modules; it has {', '.join(groups)}")
    quantiles = {"step": step, "attn": attn, "ff": ff} | {name: value for name, value in optional.items() if value is not None}
    for name, value in quantiles.items():
        check_number(name, value, 0, 1)
    taus = {"hidden": step, "attn": attn, "context_attn": attn, "ff": ff, "mlp": ff}
    taus |= {"context_ff": quantiles.get("context_ff", ff), "single_attn": quantiles.get("single_attn", attn)}
    return taus | {"single_mlp": quantiles.get("single_mlp", ff), "single_ff": ff}


def _below_quantiles(
    rate: torch.Tensor, groups: Mapping[str, list[int]], taus: Mapping[str, float], first: int, last: bool
) -> torch.Tensor:
    """[T, sites] bool: where the rate lies strictly below its group's quantile; the first rows, and the last, protected."""
    reused = torch.zeros(rate.shape, dtype=torch.bool)
    for name, columns in groups.items():
        group_rate = rate[:, columns]
        reused[:, columns] = group_rate < torch.quantile(group_rate[1:-1].flatten(), taus[name])
    reused[:first] = False
    if last:
        reused[-1] = False
    return reused


def _step_first(reused: torch.Tensor, groups: Mapping[str, list[int]]) -> torch.Tensor:
    """A reused step reuses every module, and the step after it refreshes them all, unless it is reused itself."""
    modules = [i for name, columns in groups.items() if name != "hidden" for i in columns]
    result = reused.clone()
    for step in torch.nonzero(reused[:, groups["hidden"][0]]).flatten().tolist():
        result[step, modules] = True
        if step + 1 < len(reused):
            result[step + 1, modules] = False
    return result


INVARDIFF = Policy(invardiff, source="InvarDiff, arXiv 2512.05134", needs_stats=True)
