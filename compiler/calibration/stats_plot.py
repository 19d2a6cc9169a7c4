"""The invariance pictures: how alike a site's values are at two steps, and how their change changes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.files.whole_file import save_figure
from stepgraph.plan import MODULE_KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("#1b3a5c", "#f2b134", "#c8553d", "#7fb069")


def plot_stats(stats: CalibrationStats, path: str | Path | None = None) -> "Figure":
    """One column per kind (all module kinds, and `hidden`); from top to bottom:

    mean squared difference between any two steps over the mean square (mean over the layers), cosine between any two steps,
    the same two between neighbouring steps for every layer, and the rates of change with the layers' spread (InvarDiff,
    arXiv 2512.05134, shows the like).
    """
    from matplotlib.figure import Figure

    present = dict.fromkeys(site.kind for site in stats.sites)
    kinds = [kind for kind in present if kind in (*MODULE_KINDS, "hidden")]
    figure = Figure(figsize=(3.3 * len(kinds) + 0.8, 12.5), layout="constrained")
    axes = figure.subplots(5, len(kinds), squeeze=False, gridspec_kw={"height_ratios": [1, 1, 0.7, 0.7, 0.8]})
    tables = ((stats.relative_mse, "MSE / mean square", "magma_r"), (stats.cosine, "cosine", "viridis"))
    for row, (table, label, colours) in enumerate(tables):
        pairs = {kind: _pairs(stats, table, kind) for kind in kinds}
        _draw_row(figure, axes[row], pairs, "any two steps", label, colours)
        neighbours = {kind: _neighbours(stats, table, kind) for kind in kinds}
        _draw_row(figure, axes[row + 2], neighbours, "steps s and s - 1", label, colours)
    for column, kind in enumerate(kinds):
        _draw_rates(axes[4, column], stats, kind)
    header = stats.header
    guided = f", guidance {stats.guidance_scale:g}" if len(stats.branches) > 1 else ""
    title = f"{header.model}, {header.scheduler} {header.steps} steps{guided}, {header.samples} samples"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    if path is not None:
        save_figure(path, figure, 110)
    return figure


def _pairs(stats: CalibrationStats, table: torch.Tensor, kind: str) -> torch.Tensor:
    """[T, T], the mean over the layers of a kind."""
    return table[_columns(stats, kind)].mean(0)


def _neighbours(stats: CalibrationStats, table: torch.Tensor, kind: str) -> torch.Tensor:
    """[layers, T - 1], between a step and the one before."""
    return table[_columns(stats, kind)].diagonal(offset=-1, dim1=1, dim2=2)


def _columns(stats: CalibrationStats, kind: str) -> list[int]:
    return [i for i, site in enumerate(stats.sites) if site.kind == kind]


def _draw_row(figure: "Figure", axes: Any, images: dict[str, torch.Tensor], what: str, label: str, colours: str) -> None:
    """One heat map per kind, in one scale of colours."""
    values = torch.cat([image.flatten() for image in images.values()])
    finite = values[values.isfinite()]
    low, high = (float(finite.quantile(q)) for q in (0.01, 0.99))
    for column, (kind, image) in enumerate(images.items()):
        pairs = what == "any two steps"
        top = image.shape[0] - 0.5
        extent = None if pairs else (0.5, image.shape[1] + 0.5, -0.5, top)
        drawn = axes[column].imshow(
            image, origin="lower", interpolation="nearest", aspect="equal" if pairs else "auto", cmap=colours, vmin=low,
            vmax=max(high, low + 1e-12), extent=extent,
        )  # fmt: skip
        _steps(axes[column], f"{kind}: {what}")
        axes[column].set_ylabel("" if column else "step" if pairs else "layer", fontsize=9)
        if len(image) == 1:
            axes[column].set_yticks([])
    figure.colorbar(drawn, ax=list(axes), label=label, pad=0.01)


def _draw_rates(axis: "Axes", stats: CalibrationStats, kind: str) -> None:
    """Mean and spread over the layers of every measured rate."""
    columns, last = _columns(stats, kind), len(stats.header.timesteps) - 1
    names = [name.removeprefix("rate.") for name in stats.tables if name.startswith("rate.")]
    for colour, name in zip(LINES, [n for n in names if n != "relative_l1"] + ["lagged"], strict=False):
        # The first row has no rate, and only the lagged one has a last.
        rate = stats.rate(name)[1 : last + (name == "lagged"), columns]
        steps = range(1, 1 + len(rate))
        axis.plot(steps, rate.mean(1), color=colour, label=name, linewidth=1.4)
        if len(columns) > 1:
            axis.fill_between(steps, rate.amin(1), rate.amax(1), color=colour, alpha=0.2, linewidth=0)
    axis.set_yscale("log")
    axis.legend(frameon=False, fontsize=8)
    _steps(axis, f"{kind}: rates")


def _steps(axis: "Axes", title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.tick_params(labelsize=8)
