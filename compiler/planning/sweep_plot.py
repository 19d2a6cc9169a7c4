"""The picture of a sweep."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgraph.files.whole_file import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stepgraph.compiler.planning.sweep_result import Sweep, SweepPoint

CACHED, FEWER, KNEE = "#1b3a5c", "#8c8c8c", "#c8553d"


def plot_sweep(sweep: "Sweep", path: str | Path | None = None) -> "Figure":
    """Error (log scale) against MACs per image: the swept plans, the knee, and the same sampler in fewer steps.

    The line joins the plans that no other one beats; the others are hollow. Full compute has no error and is a dotted line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    axis: Axes = figure.subplots()
    shown = [point for point in sweep.points if point.error > 0]
    shorter = sorted((point for point in sweep.baseline if point.error > 0), key=lambda point: point.macs)
    _series(axis, shorter, FEWER, "s--", f"{sweep.scheduler} in fewer steps")
    for fewer in shorter:
        _annotate(axis, fewer, str(fewer.steps), FEWER, (-5, -12))
    best = {(point.macs, point.error) for point in sweep.front}
    _series(axis, sweep.front, CACHED, "o-", f"{sweep.policy}, {', '.join(sweep.knobs)}")
    _series(axis, [point for point in shown if (point.macs, point.error) not in best], CACHED, "o", None)
    for point, text in _labels(shown):
        _annotate(axis, point, text, CACHED, (7, 5))
    _mark_knee(axis, sweep)
    axis.axvline(sweep.macs_full / 1e9, color=FEWER, linewidth=0.9, linestyle=":")
    _dress(axis, sweep)
    if path is not None:
        save_figure(path, figure)
    return figure


def _series(axis: "Axes", points: Sequence[Any], colour: str, style: str, label: str | None) -> None:
    """Measured points with their standard errors; hollow where no line joins them."""
    if points:
        axis.errorbar(
            [point.macs / 1e9 for point in points], [point.error for point in points],
            yerr=[point.standard_error for point in points], fmt=style, color=colour, markersize=5, linewidth=1.4,
            elinewidth=0.8, label=label, markerfacecolor=colour if "-" in style else "white",
        )  # fmt: skip


def _labels(points: Sequence["SweepPoint"]) -> Iterator[tuple["SweepPoint", str]]:
    """One label per place: values whose points lie on top of each other share it."""
    rest = list(points)
    while rest:
        first = rest[0]
        here = [point for point in rest if point.macs == first.macs and 0.95 < point.error / first.error < 1.05]
        rest = [point for point in rest if point not in here]
        yield first, ", ".join(_text(point.value) for point in here)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _annotate(axis: "Axes", point: Any, text: str, colour: str, offset: tuple[int, int]) -> None:
    place = (point.macs / 1e9, point.error)
    side = "left" if offset[0] > 0 else "right"
    axis.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=8, color=colour, ha=side)


def _mark_knee(axis: "Axes", sweep: "Sweep") -> None:
    knee = sweep.knee
    if knee is not None:
        ring: dict[str, Any] = {"markersize": 15, "markerfacecolor": "none", "markeredgecolor": KNEE, "markeredgewidth": 2.0}
        axis.plot([knee.macs / 1e9], [knee.error], "o", label=f"knee: {_text(knee.value)}", **ring)
    else:
        axis.plot([], [], " ", label="no knee")


def _dress(axis: "Axes", sweep: "Sweep") -> None:
    """Scales, labels and title."""
    from matplotlib.ticker import FuncFormatter

    if any(point.error > 0 for point in (*sweep.points, *sweep.baseline)):
        axis.set_yscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:.3g}")
        axis.yaxis.set_major_formatter(plain)
        low, high = axis.get_ylim()
        if high / low < 30:
            axis.yaxis.set_minor_formatter(plain)
    axis.set_xlim(right=sweep.macs_full / 1e9 * 1.02)
    axis.set_xlabel(f"GMAC per image (dotted line: all {sweep.steps} steps)")
    axis.set_ylabel("relative L2 of the final latents to full compute")
    axis.grid(visible=True, which="both", axis="y", color="#eeeeee")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper right", bbox_to_anchor=(0.99, 1.0))
    guidance = f"guidance {sweep.guidance_scale:g}" if sweep.guidance_scale > 1 else "no guidance"
    title = f"{sweep.model}, {sweep.scheduler} {sweep.steps} steps, {guidance}, N = {sweep.samples}"
    axis.set_title(title, loc="left", fontsize=11)
