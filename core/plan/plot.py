"""Pictures of plans: the heat map of one, and two side by side with what differs."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgraph.files.whole_file import save_figure
from stepgraph.plan.plan import CachePlan
from stepgraph.plan.report import summarize
from stepgraph.plan.site import COMPUTE, DEAD, KINDS, STREAM_KINDS, Action

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour per action, told apart without colour vision too.
COLOURS = {"C": "#1b3a5c", "R": "#f2b134", "L": "#7fb069", "F": "#c8553d", ".": "#e6e6e6"}
# What a (step, site) pair of two plans A and B can be. DEAD counts as not computed.
SAME, FIRST, SECOND, OTHERWISE = "same", "computed in A only", "computed in B only", "computed in neither, other action"
DIFFERENCES = {SAME: "#eeeeee", FIRST: "#2166ac", SECOND: "#d6604d", OTHERWISE: "#a9a9a9"}


def plot_plan(plan: CachePlan, path: str | Path | None = None) -> "Figure":
    """Steps x sites heat map, one panel per module kind and per stream kind ever replaced (`CachePlan.plot`)."""
    kinds = shown_kinds(plan)
    tables = {kind: list(_columns(plan, kind).values()) for kind in kinds}
    figure, axes = _grid({kind: len(tables[kind]) for kind in kinds}, [plan.steps])
    for kind in kinds:
        _draw(axes[kind][0], tables[kind], plan.steps, COLOURS)
    _label(axes, {kind: len(tables[kind]) for kind in kinds})
    figure.legend(handles=_action_patches([plan]), loc="outside lower right", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(title_of(plan), x=0.01, ha="left", fontsize=11)
    return _written(figure, path)


def plot_diff(first: CachePlan, second: CachePlan, path: str | Path | None = None) -> "Figure":
    """Two plans side by side, site by site, with a third column that shows where they differ.

    A site that only one of them has is left blank in the other and in the third column. Plans of different T have no steps in
    common: they are drawn without the third column, and the title says why.
    """
    plans = (first, second)
    kinds = [kind for kind in KINDS if any(kind in shown_kinds(plan) for plan in plans)]
    names = {kind: list(dict.fromkeys(name for plan in plans for name in _columns(plan, kind))) for kind in kinds}
    comparable = first.steps == second.steps
    depths = {kind: len(names[kind]) for kind in kinds}
    figure, axes = _grid(depths, [first.steps, second.steps] + [first.steps] * comparable)
    for kind in kinds:
        tables = [_columns(plan, kind) for plan in plans]
        for plan, table, axis in zip(plans, tables, axes[kind], strict=False):
            _draw(axis, [table.get(name) for name in names[kind]], plan.steps, COLOURS)
        if comparable:
            compared = [_difference(tables[0].get(name), tables[1].get(name)) for name in names[kind]]
            _draw(axes[kind][2], compared, first.steps, DIFFERENCES)
    _label(axes, depths)
    for plan, axis, letter in zip(plans, axes[kinds[0]], "AB", strict=False):
        # About 13 characters of this size take an inch.
        lines = textwrap.wrap(f"{letter}: {title_of(plan)}", int(13 * _width(plan.steps)))
        axis.set_title("\n".join(lines), fontsize=9, loc="left")
    if comparable:
        axes[kinds[0]][2].set_title("where they differ", fontsize=9, loc="left")
        figure.legend(handles=_patches(DIFFERENCES), loc="outside lower right", ncols=4, frameon=False, fontsize=9)
    else:
        figure.suptitle(
            f"{first.steps} and {second.steps} evaluations: no step by step difference", x=0.01, ha="left", fontsize=11
        )
    figure.legend(handles=_action_patches(plans), loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    return _written(figure, path)


def shown_kinds(plan: CachePlan) -> list[str]:
    """Every module kind of the model, and the stream kinds that are ever replaced."""

    def shown(kind: str) -> bool:
        actions = {letter for column in _columns(plan, kind).values() for letter in column}
        return bool(actions) if kind not in STREAM_KINDS else bool(actions - {COMPUTE, DEAD})

    return [kind for kind in KINDS if shown(kind)] or [plan.sites[-1].kind]


def title_of(plan: CachePlan) -> str:
    """Policy, arguments that are short enough, and what it saves."""
    brief = {name: value for name, value in plan.header.arguments.items() if value is not None and len(str(value)) <= 24}
    arguments = ", ".join(f"{name}={value}" for name, value in brief.items())
    return f"{plan.header.policy}({arguments}): {summarize(plan).ideal_speedup:.2f}x fewer MACs"


def _columns(plan: CachePlan, kind: str) -> dict[str, str]:
    """Site name -> T letters, for the sites of a kind."""
    return {site.name: "".join(row[i] for row in plan.rows) for i, site in enumerate(plan.sites) if site.kind == kind}


def _difference(first: str | None, second: str | None) -> list[str] | None:
    """What each step of a site is, of `DIFFERENCES`; nothing where one plan does not have the site."""
    if first is None or second is None:
        return None

    def compared(a: str, b: str) -> str:
        if a == b:
            return SAME
        return FIRST if a == COMPUTE else SECOND if b == COMPUTE else OTHERWISE

    return [compared(a, b) for a, b in zip(first, second, strict=True)]


def _grid(depths: Mapping[str, int], widths: Sequence[int]) -> tuple["Figure", dict[str, list["Axes"]]]:
    """A figure with a row of panels per kind, as high as the kind has sites, and a column per entry of `widths` (steps)."""
    from matplotlib.figure import Figure

    ratios = [max(depth, 1.6) for depth in depths.values()]
    each = [max(6.0, 0.16 * width + 2.2) if len(widths) == 1 else _width(width) for width in widths]
    figure = Figure(figsize=(sum(each), 0.13 * sum(ratios) + 0.55 * len(depths) + 1.3), layout="constrained")
    axes = figure.subplots(
        len(depths), len(widths), sharex="col", squeeze=False, gridspec_kw={"height_ratios": ratios, "width_ratios": each}
    )
    return figure, {kind: list(row) for kind, row in zip(depths, axes, strict=True)}


def _width(steps: int) -> float:
    """Inches of a column beside others."""
    return max(4.6, 0.105 * steps + 0.6)


def _draw(axis: "Axes", table: Sequence[Sequence[str] | None], steps: int, colours: Mapping[str, str]) -> None:
    """A panel: one line per site, one cell per step, coloured by name; a site that is not there stays blank."""
    import numpy as np
    from matplotlib.colors import ListedColormap

    names = list(colours)
    image = np.array([[np.nan] * steps if line is None else [float(names.index(cell)) for cell in line] for line in table])
    edges = [i - 0.5 for i in range(steps + 1)]
    axis.pcolormesh(
        edges, range(len(table) + 1), np.ma.masked_invalid(image), cmap=ListedColormap(list(colours.values())), vmin=-0.5,
        vmax=len(names) - 0.5, edgecolors="white", linewidth=0.4,
    )  # fmt: skip
    axis.invert_yaxis()


def _label(axes: Mapping[str, Sequence["Axes"]], depths: Mapping[str, int]) -> None:
    """Kinds and depths on the left, steps below."""
    from matplotlib.ticker import MaxNLocator

    for kind, row in axes.items():
        for axis in row:
            axis.set_yticks([])
            axis.tick_params(length=0)
        row[0].set_ylabel(kind, rotation=0, ha="right", va="center")
        if depths[kind] > 1:
            row[0].set_yticks([0.5, depths[kind] - 0.5], ["0", str(depths[kind] - 1)])
    for axis in list(axes.values())[-1]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("step (0 is the noisiest)")


def _action_patches(plans: Sequence[CachePlan]) -> list[Any]:
    """Legend entries of the actions that occur."""
    used = {letter for plan in plans for row in plan.rows for letter in row}
    return _patches({action.name.lower(): COLOURS[action.value] for action in Action if action.value in used})


def _patches(colours: Mapping[str, str]) -> list[Any]:
    from matplotlib.patches import Patch

    patch: Callable[..., Any] = Patch
    return [patch(color=colour, label=name) for name, colour in colours.items()]


def _written(figure: "Figure", path: str | Path | None) -> "Figure":
    """The figure, written to `path` where there is one."""
    if path is not None:
        save_figure(path, figure)
    return figure
