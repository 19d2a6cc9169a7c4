"""What a policy is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepgraph.plan import Site


@dataclass(frozen=True)
class Policy:
    """A way of making plans.

    Attributes:
        decide: (sites, T, stats or None, **arguments) -> actions over time by site or kind, as `CachePlan.build` takes
            them.
        source: Where the method comes from.
        needs_stats: Whether it needs calibration.
        unless: The argument that stands in for calibration, where there is one.
    """

    decide: Callable[..., Mapping[str, str]]
    source: str
    needs_stats: bool = False
    unless: str | None = None

    def wants_stats(self, arguments: Mapping[str, Any]) -> bool:
        """Whether it needs calibration, given these arguments."""
        return self.needs_stats and (self.unless is None or arguments.get(self.unless) is None)


def present_kinds(sites: Sequence[Site]) -> list[str]:
    """The kinds that occur, in the order of the sites."""
    return list(dict.fromkeys(site.kind for site in sites))


def per_kind(value: Any, kind: str, default: Any) -> Any:
    """An argument that is either one value for all kinds or a mapping from kind to value."""
    return value.get(kind, default) if isinstance(value, Mapping) else value
