"""Pictures of a runtime record: speed beside the ideal by MACs, and cost by size."""

from pathlib import Path
from typing import Any

from stepgraph.files.whole_file import save_figure

INK, ACCENT, PALE = "#1b3a5c", "#f2b134", "#c9d3dd"


def plot_table(results: dict[str, Any], path: Path) -> None:
    """One bar per contender: how much faster than the eager model, and a mark where its MACs alone would put it."""
    from matplotlib.figure import Figure

    part = results["table"]
    rows = [row for row in part["rows"] if row["over_eager"] is not None]
    figure = Figure(figsize=(9, 0.34 * len(rows) + 1.6), layout="constrained")
    axis = figure.subplots()
    places = range(len(rows))
    axis.barh(
        places, [row["over_eager"] for row in rows],
        color=[INK if row["name"].startswith("stepgraph") else PALE for row in rows],
    )  # fmt: skip
    axis.plot([row["ideal"] for row in rows], places, "|", color=ACCENT, markersize=14, markeredgewidth=3, label="by MACs")
    for place, row in zip(places, rows, strict=True):
        share = "" if row["share_of_ideal"] is None else f", {100 * row['share_of_ideal']:.0f} % of the ideal over full"
        axis.text(row["over_eager"], place, f" {row['over_eager']:.2f}x{share}", va="center", fontsize=8)
    axis.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.45 * max(max(row["over_eager"], row["ideal"]) for row in rows))
    axis.set_xlabel("times as fast as the eager model")
    axis.set_title(
        f"{results['model']}, {results['blocks']} blocks, {results['dtype']}, batch {results['batch']}, first "
        f"{part['steps_timed']} of {results['steps']} steps",
        loc="left", fontsize=10,
    )  # fmt: skip
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    save_figure(path, figure)


def plot_scaling(results: dict[str, Any], path: Path) -> None:
    """Per varied size: seconds to compile above, microseconds of a call with all sites reused below."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["varied"] for row in results["scaling"]))
    figure = Figure(figsize=(3.2 * len(names), 5), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        rows = sorted((row for row in results["scaling"] if row["varied"] == name), key=lambda row: row["value"])
        values = [row["value"] for row in rows]
        axes[0][column].plot(values, [row["compile_s"] for row in rows], "o-", color=INK)
        axes[0][column].set_ylabel("s to compile, cold")
        for what, colour in (("output", INK), ("modules", ACCENT)):
            axes[1][column].plot(values, [row["overhead_us"][what] for row in rows], "o-", color=colour, label=f"{what} reused")
        axes[1][column].set_ylabel("us a call")
        axes[1][column].set_xlabel(name)
        axes[0][column].set_ylim(bottom=0, top=1.1 * max(row["compile_s"] for row in results["scaling"]))
        # From tens of microseconds to tenths of a second.
        axes[1][column].set_yscale("log")
    axes[1][0].legend(frameon=False, fontsize=8)
    save_figure(path, figure)
