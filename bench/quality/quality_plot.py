"""The picture of a quality record: error against MACs, with the line that a cache has to stay below."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stepgraph.files.whole_file import save_figure


def style(number: int) -> tuple[str, Any]:
    """Mark and colour of the line of a number."""
    marks = "osD^vP*Xph<>d8"
    return marks[number % len(marks)], colormaps["tab20"](number % 20)


@contextmanager
def error_over_macs(results: dict[str, Any], front: list[tuple[float, float]], path: Path) -> Iterator[Axes]:
    """Axes with the best of fewer steps, for lines over the share of MACs computed, in percent; written at the end."""
    figure = Figure(figsize=(9.5, 5.4), layout="constrained")
    axis = figure.subplots()
    best = [(100 * share, error) for share, error in front]
    axis.plot(*zip(*best, strict=True), color="black", linewidth=1.8, label="fewer steps", zorder=1)
    yield axis
    axis.set_yscale("log")
    axis.set_xlabel("MACs computed, % of full compute")
    axis.set_ylabel("relative L2 against full compute")
    title = f"{results['model']}, {results['scheduler']} {results['steps']} steps, {results['samples']} images"
    axis.set_title(title, loc="left", fontsize=11)
    axis.grid(alpha=0.25, which="both")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    save_figure(path, figure)


def plot_quality(results: dict[str, Any], front: list[tuple[float, float]], path: Path) -> None:
    """A point per policy and target with the seeds' spread, and one for every count of fewer steps."""
    rows = [row for row in results["rows"] if "relative_l2" in row and row["name"] != "other seed"]
    with error_over_macs(results, front, path) as axis:
        counts = [(100 / row["fewer_macs"], row["relative_l2"]) for row in rows if row["name"] == "fewer steps"]
        axis.plot(*zip(*counts, strict=True), ".", color="black", markersize=5, zorder=1)
        for index, name in enumerate(dict.fromkeys(row["name"] for row in rows if row["name"] != "fewer steps")):
            points = [row for row in rows if row["name"] == name]
            mark, colour = style(index)
            axis.errorbar(
                [100 / row["fewer_macs"] for row in points],
                [row["relative_l2"] for row in points],
                yerr=[row["seed_spread"] or 0 for row in points],
                fmt=mark, color=colour, markersize=6, linewidth=1, label=name,
            )  # fmt: skip
