"""The picture of a corrections record: error against MACs, one line per way of correcting."""

from pathlib import Path
from typing import Any

from stepgraph.bench.quality.quality_plot import error_over_macs, style


def plot_corrections(results: dict[str, Any], front: list[tuple[float, float]], path: Path) -> None:
    """A line per way of correcting and period, over the ranks where there are any, against fewer steps."""
    rows = [row for row in results["rows"] if row["name"] != "fewer steps"]
    with error_over_macs(results, front, path) as axis:
        for index, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
            points = [row for row in rows if row["name"] == name]
            label: str | None = name
            mark, colour = style(index)
            for period in dict.fromkeys(row["setting"].split()[0] for row in points):
                line = [row for row in points if row["setting"].split()[0] == period]
                axis.plot(
                    [100 / row["fewer_macs"] for row in line], [row["relative_l2"] for row in line],
                    f"{mark}-", color=colour, markersize=5, linewidth=1, label=label,
                )  # fmt: skip
                label = None
