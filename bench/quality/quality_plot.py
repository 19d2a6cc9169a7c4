"""The picture of a quality record: error against MACs, with the line that a cache has to stay below."""

from pathlib import Path
from typing import Any

from stepgraph.files.whole_file import whole_file

MARKS = "osD^vP*Xph<>d8"


def plot_quality(results: dict[str, Any], front: list[tuple[float, float]], path: Path) -> None:
    """Relative L2 against the share of MACs computed, logarithmic; fewer steps as points, and a line through the best."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if "relative_l2" in row and row["name"] != "other seed"]
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "fewer steps"))
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axis = figure.subplots()
    counts = [(100 / row["fewer_macs"], row["relative_l2"]) for row in rows if row["name"] == "fewer steps"]
    axis.plot(*zip(*counts, strict=True), ".", color="black", markersize=5, zorder=1)
    best = [(100 * share, error) for share, error in front]
    axis.plot(*zip(*best, strict=True), color="black", linewidth=1.8, label="fewer steps", zorder=1)
    for style, name in enumerate(names):
        points = [row for row in rows if row["name"] == name]
        axis.errorbar(
            [100 / row["fewer_macs"] for row in points],
            [row["relative_l2"] for row in points],
            yerr=[row["seed_spread"] or 0 for row in points],
            fmt=MARKS[style % len(MARKS)], color=colormaps["tab20"](style % 20), markersize=6, linewidth=1, label=name,
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("MACs computed, % of full compute")
    axis.set_ylabel("relative L2 against full compute")
    axis.set_title(
        f"{results['model']}, {results['scheduler']} {results['steps']} steps, {results['samples']} images",
        loc="left",
        fontsize=11,
    )
    axis.grid(alpha=0.25, which="both")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
