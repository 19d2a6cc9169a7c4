"""What a plan does, for people: counts per kind, costs, warnings, and the difference of two plans."""

from dataclasses import asdict, dataclass
from typing import Any

from stepgraph.plan.liveness import MAPS, Stored, peak_bytes, traffic
from stepgraph.plan.plan import CachePlan
from stepgraph.plan.site import KINDS, LOWRANK, REPLACED, STREAM_KINDS, Action, first_live
from stepgraph.plan.warnings import plan_warnings


@dataclass(frozen=True)
class KindCount:
    """How often the sites of one kind take each action over the whole run."""

    kind: str
    sites: int
    computed: int
    reused: int
    corrected: int
    dead: int

    @property
    def reuse_rate(self) -> float:
        """Share of the (step, site) pairs that are not computed."""
        return 1 - self.computed / (self.computed + self.reused + self.corrected + self.dead)


@dataclass(frozen=True)
class PlanSummary:
    """A plan in numbers, per sample.

    Attributes:
        policy: The policy that made it.
        steps: T.
        kinds: Counts for every kind of site the model has.
        macs: Multiply-accumulates that the whole run computes, over all branches.
        macs_total: The same with nothing reused.
        peak_slot_bytes: The most bytes of stored values held at once.
        warnings: What the numbers do not show, such as that a plan is nothing but a shorter schedule.
    """

    policy: str
    steps: int
    kinds: tuple[KindCount, ...]
    macs: int
    macs_total: int
    peak_slot_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def ideal_speedup(self) -> float:
        """Total over computed MACs: the speed-up if time were proportional to MACs."""
        return self.macs_total / self.macs if self.macs else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        kinds = {count.kind: asdict(count) | {"reuse_rate": count.reuse_rate} for count in self.kinds}
        speedup = self.ideal_speedup if self.macs else None
        return asdict(self) | {"kinds": kinds, "ideal_speedup": speedup}

    def __str__(self) -> str:
        lines = [f"policy {self.policy}, {self.steps} steps"]
        lines += [
            f"  {count.kind:<15}{count.sites:>4} sites  {count.reuse_rate:>6.1%} not computed  "
            f"(computed {count.computed}, reused {count.reused}, corrected {count.corrected}, dead {count.dead})"
            for count in self.kinds
        ]
        lines.append(
            f"  MACs {self.macs / 1e9:.3f} G of {self.macs_total / 1e9:.3f} G per sample, ideal {self.ideal_speedup:.2f}x"
        )
        lines.append(f"  peak stored values {self.peak_slot_bytes / 1e6:.3f} MB per sample")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def row_macs(plan: CachePlan, row: str, stores: tuple[Stored, ...] = ()) -> int:
    """Multiply-accumulates per sample of one step, which stores the values `stores`.

    A LOWRANK counts as a reuse where the plan is not bound to factors.
    """
    live = first_live(plan.sites, row)
    # A replaced stream value saves everything before it, and a module site itself with what is DEAD inside.
    saved = sum(site.macs for site, action in zip(plan.sites[live:], row[live:], strict=True) if action in REPLACED)
    for i, action in enumerate(row):
        if action == LOWRANK and not plan.sites[i].output:
            saved += plan.increments[i].saved if i in plan.increments else plan.sites[i].macs
    replaced = row[live] in REPLACED and plan.sites[live].kind in STREAM_KINDS
    if replaced and any(plan.sites[stored.site].kind == "stack_residual" for stored in stores):
        # To store the stack's residual, the tokens that go into it are computed even where a block was replaced.
        macs = {site.kind: site.macs for site in plan.sites}
        saved -= macs["hidden"] - macs["stack_residual"]
    projected = (plan.increments[stored.site] for stored in stores if stored.part == MAPS and stored.site in plan.increments)
    return plan.header.macs - saved + sum(increment.projection for increment in projected)


def summarize(plan: CachePlan) -> PlanSummary:
    """Count a plan's actions, costs and stored bytes (`CachePlan.summary`).

    The cost of LOWRANK depends on the factors; it counts as a reuse where the plan is not bound to any.
    """
    counts = []
    for kind in KINDS:
        columns = [i for i, site in enumerate(plan.sites) if site.kind == kind]
        if columns:
            actions = [row[i] for row in plan.rows for i in columns]
            tally = {action: actions.count(action) for action in Action}
            corrected = tally[Action.LOWRANK] + tally[Action.FORECAST]
            counts.append(
                KindCount(kind, len(columns), tally[Action.COMPUTE], tally[Action.REUSE], corrected, tally[Action.DEAD])
            )
    branches = len(plan.header.branches)
    macs = branches * sum(row_macs(plan, row, step.stores) for row, step in zip(plan.rows, traffic(plan), strict=True))
    total = branches * plan.header.macs * plan.steps
    return PlanSummary(plan.header.policy, plan.steps, tuple(counts), macs, total, peak_bytes(plan), plan_warnings(plan))


def _changed_forecasts(old: CachePlan, new: CachePlan) -> int:
    """Number of (step, site) pairs whose forecasts differ, sites taken by name."""
    named = [{(s, plan.sites[i].name): f for (s, i), f in plan.forecasts.items()} for plan in (old, new)]
    return sum(named[0].get(pair) != named[1].get(pair) for pair in named[0].keys() | named[1].keys())


def diff_plans(old: CachePlan, new: CachePlan) -> dict[str, Any]:
    """What changed between two plans: header fields, sites only one has, and the (step, site) pairs that differ.

    Plans of different T have no steps in common: `pairs_changed` is None then.
    """
    before, after = asdict(old.header), asdict(new.header)
    for facts, others in ((before, new.header.facts), (after, old.header.facts)):
        facts["facts"] = {path: text for path, text in facts["facts"].items() if others.get(path) != text}
    header = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
    columns = [{site.name: "".join(row[i] for row in plan.rows) for i, site in enumerate(plan.sites)} for plan in (old, new)]
    shared = [name for name in columns[0] if name in columns[1]]
    changed = {name: [columns[0][name], columns[1][name]] for name in shared if columns[0][name] != columns[1][name]}
    pairs = None
    if old.steps == new.steps:
        pairs = sum(a != b for was, now in changed.values() for a, b in zip(was, now, strict=True))
    return {
        "header": header,
        "only_in_first": [name for name in columns[0] if name not in columns[1]],
        "only_in_second": [name for name in columns[1] if name not in columns[0]],
        "sites": changed,
        "pairs_changed": pairs,
        "forecasts_changed": _changed_forecasts(old, new) if old.steps == new.steps else None,
    }
