"""What a policy is."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepgraph.plan import MODULE_KINDS, CachePlan, PlanError, Site


@dataclass(frozen=True)
class Policy:
    """A way of making plans.

    Attributes:
        decide: (sites, T, stats or None, **arguments) -> actions over time by site or kind, as `CachePlan.build` takes
            them; or the plan itself, where a service made it.
        source: Where the method comes from.
        needs_stats: Whether it needs calibration.
        unless: The argument that stands in for calibration, where there is one.
    """

    decide: Callable[..., Mapping[str, str] | CachePlan]
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


def check_whole(name: str, value: Any, least: int = 0, most: int | None = None, where: str = "") -> None:
    """Refuse what is not a whole number in least..most."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"in {least}..{most}"
        raise PlanError(f"{name} is {value!r}{where}; expected a whole number {wanted}")


def check_number(name: str, value: Any, least: float = 0, most: float = math.inf, where: str = "") -> None:
    """Refuse what is not a finite number in least..most."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not numeric or not least <= value <= most:
        wanted = f"of at least {least:g}" if most == math.inf else f"in {least:g}..{most:g}"
        raise PlanError(f"{name} is {value!r}{where}; expected a number {wanted}")


def check_numbers(name: str, values: Any) -> list[float]:
    """A list (or vector) of finite numbers as floats."""
    listed = values.tolist() if isinstance(values, (torch.Tensor, np.ndarray)) else values
    if not isinstance(listed, (list, tuple)) or not listed:
        raise PlanError(f"{name} is {values!r}; expected a list of numbers")
    for i, value in enumerate(listed):
        check_number(f"{name}[{i}]", value, least=-math.inf)
    return [float(value) for value in listed]


def chosen_kinds(kinds: Any, sites: Sequence[Site]) -> list[str]:
    """The kinds that a policy's `kinds` names; all module kinds of the model where it is None."""
    present = present_kinds(sites)
    if kinds is None:
        return [kind for kind in present if kind in MODULE_KINDS]
    if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not all(isinstance(kind, str) for kind in kinds):
        raise PlanError(f"kinds is {kinds!r}; expected a list, such as {present[:2]}")
    unknown = sorted(set(kinds) - set(present))
    if unknown:
        raise PlanError(f"unknown kind {unknown[0]!r}; this model has {', '.join(present)}")
    return list(kinds)
