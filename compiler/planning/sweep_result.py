"""What a sweep found: its points, the knee among them, and the baseline that they have to beat."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgraph.checked import checked
from stepgraph.metrics import error_at_equal_macs
from stepgraph.plan import CachePlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SamplingCost:
    """What one way of sampling costs.

    Attributes:
        macs: Multiply-accumulates per image over the whole run, both halves of the guidance included.
        error: Mean over the samples of the relative L2 of the final latents against full compute of the same sampler.
        standard_error: Of that mean.
    """

    macs: int
    error: float
    standard_error: float


@dataclass(frozen=True)
class SweepPoint(SamplingCost):
    """One value of the knob, and the plan it makes."""

    value: Any
    plan: CachePlan


@dataclass(frozen=True)
class FewerSteps(SamplingCost):
    """The same sampler at full compute in fewer steps: what a cache has to beat."""

    steps: int


@dataclass(frozen=True)
class Sweep:
    """A swept knob (`stepgraph.sweep`).

    Attributes:
        policy: The policy.
        knobs: The arguments that took the values.
        model: Class name of the model.
        scheduler: Class name of the scheduler.
        steps: Number of inference steps.
        samples: Samples behind every error.
        guidance_scale: Classifier-free guidance; 1 for none.
        seed: Of the noise.
        macs_full: Multiply-accumulates per image of full compute.
        points: In the order of the values.
        baseline: Fewer steps at about the MACs of the points, most steps first.
    """

    policy: str
    knobs: tuple[str, ...]
    model: str
    scheduler: str
    steps: int
    samples: int
    guidance_scale: float
    seed: int
    macs_full: int
    points: tuple[SweepPoint, ...]
    baseline: tuple[FewerSteps, ...]

    @property
    def front(self) -> list[SweepPoint]:
        """The points that no other one equals or beats in MACs and in error, fewest MACs first."""
        return [self.points[i] for i in pareto_front([(point.macs, point.error) for point in self.points])]

    @property
    def knee(self) -> SweepPoint | None:
        """Where saving more MACs begins to cost more than it did (`find_knee`), if there is such a point."""
        index = find_knee([(point.macs, point.error) for point in self.points])
        return None if index is None else self.points[index]

    @checked
    def fewer_steps_error(self, macs: float) -> float | None:
        """The error of fewer steps at these MACs (`error_at_equal_macs`); None below the fewest measured."""
        return error_at_equal_macs([*((step.macs, step.error) for step in self.baseline), (self.macs_full, 0.0)], macs)

    @checked
    def plot(self, path: str | Path | None = None) -> "Figure":
        """Error against MACs with the knee and the baseline; written to `path` where given."""
        from stepgraph.compiler.planning.sweep_plot import plot_sweep

        return plot_sweep(self, path)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the plans."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("points", "baseline")}
        knee = self.knee
        points = [
            {
                "value": point.value,
                "macs": point.macs,
                "fewer_macs": self.macs_full / point.macs if point.macs else None,
                "error": point.error,
                "standard_error": point.standard_error,
                "fewer_steps_error": self.fewer_steps_error(point.macs),
            }
            for point in self.points
        ]
        return facts | {
            "points": points,
            "baseline": [asdict(point) for point in self.baseline],
            "knee": None if knee is None else knee.value,
        }


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (MACs, error) that no other point equals or beats in both, fewest MACs first; of equal ones the first.

    Points without error, whose logarithm has no place on the axis, and those that are not finite are left out.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if 0 < points[i][1] < math.inf and (not front or points[i][1] < points[front[-1]][1]):
            front.append(i)
    return front


def find_knee(points: Sequence[tuple[float, float]]) -> int | None:
    """Index of the knee among (MACs, error): the point of the front that lies farthest below its chord.

    MACs and log error are scaled to 0..1 over the front; the chord joins the front's two ends. There is no knee where the front
    has fewer than three points, or none of them lies below the chord by more than rounding.
    """
    front = pareto_front(points)
    if len(front) < 3:
        return None
    (left, highest), (right, lowest) = points[front[0]], points[front[-1]]

    def depth(i: int) -> float:
        # In the scaled plane the chord is x + y = 1, and the distance from it (1 - x - y) / sqrt(2).
        x = (points[i][0] - left) / (right - left)
        return 1 - x - math.log(points[i][1] / lowest) / math.log(highest / lowest)

    deepest = max(front, key=depth)
    return deepest if depth(deepest) > 1e-9 else None
