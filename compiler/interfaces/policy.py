"""What a policy is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepgraph.checks import shown
from stepgraph.errors import ArgumentError
from stepgraph.plan import MODULE_KINDS, CachePlan, Site
from stepgraph.plan.header import CHOICE, NOTHING


@dataclass(frozen=True)
class Policy:
    """A way of making plans.

    Attributes:
        decide: (sites, T, stats or None, **arguments) -> actions over time by site or kind, as `CachePlan.build` takes
            them; or the plan itself, where a service made it.
        source: Where the method comes from.
        needs_stats: Whether it needs calibration.
        unless: The argument that stands in for calibration, where there is one.
        measures: Whether it measures on the model itself, without a calibration.
    """

    decide: Callable[..., Mapping[str, str] | CachePlan]
    source: str
    needs_stats: bool = False
    unless: str | None = None
    measures: bool = False

    def wants_stats(self, arguments: Mapping[str, Any]) -> bool:
        """Whether it needs calibration, given these arguments."""
        return self.needs_stats and (self.unless is None or arguments.get(self.unless) is None)

    def measured(self, arguments: Mapping[str, Any]) -> str:
        """What it measures on the weights, given these arguments: a plan that measured nothing follows any others."""
        return CHOICE if self.measures or self.wants_stats(arguments) else NOTHING


def present_kinds(sites: Sequence[Site]) -> list[str]:
    """The kinds that occur, in the order of the sites."""
    return list(dict.fromkeys(site.kind for site in sites))


def per_kind(value: Any, kind: str, default: Any) -> Any:
    """An argument that is either one value for all kinds or a mapping from kind to value."""
    return value.get(kind, default) if isinstance(value, Mapping) else value


def chosen_kinds(kinds: Any, sites: Sequence[Site]) -> list[str]:
    """The kinds that a policy's `kinds` names; all module kinds of the model where it is None."""
    present = present_kinds(sites)
    if kinds is None:
        return [kind for kind in present if kind in MODULE_KINDS]
    if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not all(isinstance(kind, str) for kind in kinds):
        raise ArgumentError(f"kinds is {shown(kinds)}; expected a list, such as {present[:2]}")
    unknown = sorted(set(kinds) - set(present))
    if unknown:
        raise ArgumentError(f"unknown kind {unknown[0]!r}; this model has {', '.join(present)}")
    return list(kinds)
