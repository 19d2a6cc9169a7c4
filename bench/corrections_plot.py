"""The picture of a corrections record: error against MACs, one line per way of correcting."""

from pathlib import Path
from typing import Any

from stepgraph.files import whole_file

MARKS = "osD^vP*Xph<>d8"


def plot_corrections(results: dict[str, Any], front: list[tuple[float, float]], path: Path) -> None:
    """Left: low-rank increments, a line per method and period over the ranks; right: the rest. Both against fewer steps."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    methods = ("none", "svd", "ca", "cd", "cov")
    rows = [row for row in results["rows"] if row["name"] != "fewer steps"]
    figure = Figure(figsize=(14, 5.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = ([row for row in rows if row["name"] in methods], [row for row in rows if row["name"] not in methods])
    for axis, panel, title in zip(axes, panels, ("low-rank increments", "forecasts and compositions"), strict=True):
        best = [(100 * share, error) for share, error in front]
        if best:
            axis.plot(*zip(*best, strict=True), color="black", linewidth=1.8, label="fewer steps", zorder=1)
        names = list(dict.fromkeys(row["name"] for row in panel))
        for number, name in enumerate(names):
            own = [row for row in panel if row["name"] == name]
            colour = colormaps["tab20"](number % 20)
            label: str | None = name
            for period in dict.fromkeys(row["setting"].split()[0] for row in own):
                line = [row for row in own if row["setting"].split()[0] == period]
                axis.plot(
                    [100 / row["fewer_macs"] for row in line], [row["relative_l2"] for row in line],
                    MARKS[number % len(MARKS)] + "-", color=colour, markersize=5, linewidth=1, label=label,
                )  # fmt: skip
                label = None
        axis.set_yscale("log")
        axis.set_xlabel("MACs computed, % of full compute")
        axis.set_title(title, loc="left", fontsize=11)
        axis.grid(alpha=0.25, which="both")
        axis.legend(frameon=False, fontsize=8, loc="upper right", ncols=2 if len(names) > 8 else 1)
    axes[0].set_ylabel("relative L2 against full compute")
    figure.suptitle(
        f"{results['model']}, {results['scheduler']} {results['steps']} steps, {results['samples']} images", x=0.01, ha="left"
    )
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
