"""What a GPU has to show: each figure with its bar, read from the rows of `bench/gpu_suite.sh prove`.

Bars hold for an H100 or H200 in bfloat16. Ratios are of figures of one run on one machine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stepgraph.bench.rows import Figures

Measured = Callable[[Figures], float | None]
Row = tuple[str, str]
DIT_FULL, FLUX_FULL, FLUX_FAST = ("dit1", "ours full, graph"), ("flux", "ours full, graph"), ("flux", "ours fast book, graph")
OURS = ("modulated_norm", "gated_residual", "linear_combination")


@dataclass(frozen=True)
class Bar:
    """A figure and what it has to be.

    Attributes:
        part: Where it is measured.
        what: In words, with its unit.
        measured: The figure; None where a row is missing, or was refused.
        bar: At least this, or where `at_most` at most; None for a figure that is only reported.
        at_most: Whether less is better.
        aim: What would be better still; empty for none.
    """

    part: str
    what: str
    measured: Measured
    bar: float | None
    at_most: bool = False
    aim: str = ""

    def verdict(self, figures: Figures) -> str:
        """ "met", "missed", "reported", or why there is no figure."""
        value = self.measured(figures)
        if value is None:
            rows = figures.get(self.part)
            return "not reached" if rows is None or set(rows) == {"begun"} else "not measured"
        if self.bar is None:
            return "reported"
        return "met" if (value <= self.bar if self.at_most else value >= self.bar) else "missed"


def figure(part: str, row: str, name: str) -> Measured:
    """One figure of one row."""
    return lambda figures: _figure(figures, part, row, name)


def ratio(slower: Row, faster: Row) -> Measured:
    """How many times as long one row takes as another."""

    def measured(figures: Figures) -> float | None:
        one, other = _figure(figures, *slower, "seconds"), _figure(figures, *faster, "seconds")
        return one / other if one is not None and other else None

    return measured


def least(part: str, name: str, rows: Callable[[str], bool]) -> Measured:
    """The smallest figure among rows."""

    def measured(figures: Figures) -> float | None:
        values = [_figure(figures, part, row, name) for row in figures.get(part, {}) if rows(row)]
        known = [value for value in values if value is not None]
        return min(known) if known and len(known) == len(values) else None

    return measured


def _figure(figures: Figures, part: str, row: str, name: str) -> float | None:
    value = figures.get(part, {}).get(row, {}).get(name)
    return None if value is None else float(value)


def share_of_ideal(figures: Figures) -> float | None:
    """Of what FLUX's fast book would gain over our full run if time were proportional to MACs."""
    gain = ratio(FLUX_FULL, FLUX_FAST)(figures)
    ideal = _figure(figures, "flux", "ours fast book", "ideal")
    return gain / ideal if gain is not None and ideal else None


def of_kernel(name: str, smallest: int = 0) -> Callable[[str], bool]:
    """Rows of an operation at so many tokens and more; they are named "operation, tokens, ..."."""
    return lambda row: row.split(", ")[0] == name and int(row.split(", ")[1]) >= smallest


BARS = (
    Bar("tests", "GPU tests that failed", figure("tests", "tests", "failed"), 0, at_most=True),
    Bar("dit1", "DiT, 1 image: full plan, x eager", ratio(("dit1", "eager"), DIT_FULL), None),
    Bar("dit1", "DiT, 1 image: full plan, x regional compile", ratio(("dit1", "regional"), DIT_FULL), None),
    Bar("dit1", "DiT, 1 image: full plan, ms a step", figure(*DIT_FULL, "ms_per_step"), 1.5, at_most=True),
    Bar("dit1", "DiT, 1 image: launches a step", figure(*DIT_FULL, "launches_per_step"), None),
    Bar("dit1", "DiT, 1 image: full plan without graphs, ms a step", figure("dit1", "ours full, loop", "ms_per_step"), None),
    Bar("dit1", "DiT, 1 image: slow book, x full plan", ratio(DIT_FULL, ("dit1", "ours slow book, graph")), 2.4),
    Bar("dit1", "DiT: seconds until a second process is ready", figure("dit1", "ours full", "ready_s"), 10, at_most=True),
    Bar("dit16", "DiT, 16 images: share of the product ceiling", figure("dit16", "ours full, graph", "share"), 0.65),
    Bar("flux", "FLUX: full plan, x regional compile", ratio(("flux", "regional"), FLUX_FULL), 1.1),
    Bar("flux", "FLUX: fast book, x eager", ratio(("flux", "eager"), FLUX_FAST), 4.5),
    Bar("flux", "FLUX: fast book, share of its MAC-ideal", share_of_ideal, 0.89),
    Bar("flux", "FLUX: seconds of the fingerprint", figure("flux", "fingerprint", "seconds"), 3, at_most=True),
    Bar("flux", "FLUX: seconds until a second process is ready", figure("flux", "ours full", "ready_s"), 20, at_most=True),
    Bar("kernels", "lowrank_delta, x two products, least", least("kernels", "versus_torch", of_kernel("lowrank_delta")), 1.0,
        aim="1.3"),
    Bar("kernels", "lowrank_delta, share of its floor, least",
        least("kernels", "share_of_floor", of_kernel("lowrank_delta")), None, aim="0.6"),
    *(Bar("kernels", f"{name}, x torch.compile, least", least("kernels", "versus_compile", of_kernel(name)), 1.0)
      for name in OURS),
    *(Bar("kernels", f"{name}, share of the copy bandwidth from 4608 tokens on, least",
          least("kernels", "share_of_copy", of_kernel(name, 4608)), 0.8) for name in OURS),
    Bar("whole", "DiT, 1 image: full plan, x whole model with reduce-overhead",
        ratio(("whole", "reduce-overhead"), DIT_FULL), 1.1),
)  # fmt: skip


def against_bars(figures: Figures, rehearsed: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of the table: part, what, measured, bar, aim, verdict; of a rehearsal no figure is held against its bar."""
    for bar in BARS:
        sign, verdict = "<=" if bar.at_most else ">=", bar.verdict(figures)
        yield {
            "part": bar.part, "what": bar.what, "measured": bar.measured(figures),
            "bar": "" if bar.bar is None else f"{sign} {bar.bar:g}", "aim": bar.aim,
            "verdict": "rehearsed" if rehearsed and verdict in ("met", "missed") else verdict,
        }  # fmt: skip
