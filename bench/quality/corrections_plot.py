"""The picture of a corrections record: error against MACs, one line per way of correcting."""

from pathlib import Path
from typing import Any

from stepgraph.files.whole_file import whole_file

MARKS = "osD^vP*Xph<>d8"


def plot_corrections(results: dict[str, Any], front: list[tuple[float, float]], path: Path) -> None:
    """A line per way of correcting and period, over the ranks where there are any, against fewer steps."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["name"] != "fewer steps"]
    figure = Figure(figsize=(9.5, 5.4), layout="constrained")
    axis = figure.subplots()
    best = [(100 * share, error) for share, error in front]
    axis.plot(*zip(*best, strict=True), color="black", linewidth=1.8, label="fewer steps", zorder=1)
    for style, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        points = [row for row in rows if row["name"] == name]
        label: str | None = name
        for period in dict.fromkeys(row["setting"].split()[0] for row in points):
            line = [row for row in points if row["setting"].split()[0] == period]
            axis.plot(
                [100 / row["fewer_macs"] for row in line], [row["relative_l2"] for row in line],
                MARKS[style % len(MARKS)] + "-", color=colormaps["tab20"](style % 20), markersize=5, linewidth=1, label=label,
            )  # fmt: skip
            label = None
    axis.set_yscale("log")
    axis.set_xlabel("MACs computed, % of full compute")
    axis.set_ylabel("relative L2 against full compute")
    title = f"{results['model']}, {results['scheduler']} {results['steps']} steps, {results['samples']} images"
    axis.set_title(title, loc="left", fontsize=11)
    axis.grid(alpha=0.25, which="both")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
