"""What a plan says about corrected values: forecasts from stored values, and the cost of low-rank increments."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from stepgraph.checked import check_fields
from stepgraph.checks import LARGEST, check_number, check_whole
from stepgraph.errors import PlanError

TERM = re.compile(r"y[1-9]|x[0-9]|1")
CONSTANT = "1"


@dataclass(frozen=True)
class Forecast:
    """A fixed linear combination that stands in for a value.

    Attributes:
        terms: What is combined: "y1" the site's last stored value, "y2" the one before it, and so on; for the site `output`
            also "x0", the model's latent input now, and "x1", "x2", its input at the steps where y1, y2 were stored; last,
            "1" is a constant.
        coefficients: One row of as many numbers as terms per branch of the plan. Empty where every channel has coefficients of
            its own: those lie in the factors, under "<site name>/<step>".
    """

    terms: tuple[str, ...]
    coefficients: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "a forecast's ")
        object.__setattr__(self, "terms", tuple(self.terms))
        what = f"the forecast of {list(self.terms)}"
        for coefficient in (coefficient for row in self.coefficients for coefficient in row):
            check_number(f"{what}: a coefficient", coefficient, -math.inf, what="a finite number")
        object.__setattr__(self, "coefficients", tuple(tuple(float(c) for c in row) for row in self.coefficients))
        if not self.terms or any(not isinstance(term, str) or not TERM.fullmatch(term) for term in self.terms):
            raise PlanError(f"{what}: a term is 'y1'..'y9' (stored values), 'x0'..'x9' (the model's input) or '1'")
        if len(set(self.terms)) < len(self.terms) or not self.ages:
            raise PlanError(f"{what}: every term stands once, and at least one is a stored value")
        if list(self.terms) != sorted(self.terms, key=lambda term: "yx1".index(term[0])):
            raise PlanError(f"{what}: stored values come first, then inputs of the model, then the constant")
        if not self.coefficients and self.inputs:
            raise PlanError(f"{what}: coefficients per channel are for stored values and a constant only")
        for row in self.coefficients:
            if len(row) != len(self.terms):
                raise PlanError(f"{what}: the coefficients {list(row)}; expected {len(self.terms)} numbers")

    @property
    def per_channel(self) -> bool:
        """Whether the coefficients lie in the factors, one row per channel."""
        return not self.coefficients

    @property
    def ages(self) -> tuple[int, ...]:
        """Which stored values are read, 1 for the last."""
        return tuple(int(term[1:]) for term in self.terms if term.startswith("y"))

    @property
    def inputs(self) -> tuple[int, ...]:
        """Which of the model's inputs are read, 0 for the present one."""
        return tuple(int(term[1:]) for term in self.terms if term.startswith("x"))


@dataclass(frozen=True)
class Increment:
    """What a LOWRANK site costs with the factors that a plan is bound to, per sample.

    Attributes:
        ranks: Path of each linear map inside the site (the site's own where one map spans it) -> rank.
        saved: Multiply-accumulates that LOWRANK saves against COMPUTE; below 0 where the ranks are so large that it costs more.
        projection: Multiply-accumulates of projecting the maps' inputs, in steps that store them for a later LOWRANK.
        bytes: Size of what such a step stores: the maps' outputs, and their inputs in rank space.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    saved: int = 0
    projection: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "an increment's ")
        for path, rank in self.ranks.items():
            check_whole(f"an increment's rank of {path!r}", rank)
        for name in ("projection", "bytes"):
            check_whole(f"an increment's {name}", getattr(self, name))
        # Where the correction costs more than the map, less than nothing is saved.
        check_whole("an increment's saved", self.saved, -LARGEST, LARGEST)
