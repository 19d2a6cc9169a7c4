"""What InvarDiff's open choices are worth on glyph-dit: phase 2, the protected ends, the metric, the calibration's size.

    python -m stepgraph.bench.quality.ablations --scheduler ddim --steps 20 --out bench/results

Every plan is tuned to about half the MACs, so that choices are compared at equal cost, and measured as in
`bench.quality.quality`. For the calibration's size three draws of the samples are taken, and `agreement` is the share of
(step, site) pairs in which a plan equals the one from the largest calibration of the same draw.
"""

from pathlib import Path
from typing import Any

from rich.progress import Progress

from stepgraph.bench.quality.paired import Host, host_options
from stepgraph.bench.quality.quality import Knob, corrected, invardiff, tuned
from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_rows
from stepgraph.compiler.calibration.calibrate import calibrate
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.files.whole_file import save_figure
from stepgraph.plan import CachePlan

TARGET = 2.0
SIZES = (1, 2, 4, 8, 16, 32)
DRAWS = (1000, 2000, 3000)
MODES = {"steps and modules": False, "modules": True}
CHOICES: dict[str, dict[str, Any]] = {
    "v1": {"metric": "v1"},
    "v1, phase 2": {"metric": "v1", "phase2": True},
    "relative_l1, phase 2": {"metric": "relative_l1", "phase2": True},
    "lagged": {"metric": "lagged"},
}


def planned(host: Host, stats: CalibrationStats, knob: Knob) -> CachePlan:
    """The plan at the target, with phase 2 where the knob has it."""
    _, plan = tuned(knob, stats, TARGET)
    return corrected(host, stats, plan) if knob.phase2 else plan


def measured(host: Host, plan: CachePlan, **facts: Any) -> dict[str, Any]:
    """A row."""
    return {**facts, "fewer_macs": plan.summary().ideal_speedup, **host.compare(host.images(host.compiled(plan)))}


def choices(host: Host, stats: CalibrationStats, progress: Progress) -> list[dict[str, Any]]:
    """Metric and phase 2, by protected ends and by what is reused."""
    rows = []
    bar = progress.add_task("", total=len(MODES) * len(CHOICES) * 3)
    for mode, modules_only in MODES.items():
        for name, choice in CHOICES.items():
            for protect in ("both", "first", "none"):
                progress.update(bar, description=f"{mode}, {name}, protect {protect}", advance=1)
                plan = planned(host, stats, invardiff(modules_only=modules_only, protect=protect, **choice))
                rows.append(measured(host, plan, name=f"{mode}: {name}", mode=mode, choice=name, protect=protect))
    return rows


def sizes(host: Host, progress: Progress) -> list[dict[str, Any]]:
    """Calibration sizes, in three draws."""
    rows = []
    bar = progress.add_task("", total=len(DRAWS) * len(SIZES) * 2)
    for draw in DRAWS:
        largest: dict[str, CachePlan] = {}
        for size in reversed(SIZES):
            stats = calibrate(host.model, host.scheduler, steps=host.steps, samples=size, seed=draw, channels=False)
            for name in ("v1, phase 2", "lagged"):
                progress.update(bar, description=f"{size} samples, {name}", advance=1)
                plan = planned(host, stats, invardiff(modules_only=True, **CHOICES[name]))
                whole = largest.setdefault(name, plan)
                same = sum(
                    a == b for one, two in zip(plan.rows, whole.rows, strict=True) for a, b in zip(one, two, strict=True)
                )
                agreement = same / (plan.steps * len(plan.sites))
                rows.append(measured(host, plan, name=name, size=size, draw=draw, agreement=agreement))
    return rows


def plot(results: dict[str, Any], path: Path) -> None:
    """Left and middle: choices by mode; right: error over calibration size."""
    from matplotlib.figure import Figure

    colours = {"both": "#1b3a5c", "first": "#f2b134", "none": "#c8553d"}
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, mode in zip(axes, MODES, strict=False):
        for index, (protect, colour) in enumerate(colours.items()):
            rows = [row for row in results["choices"] if (row["mode"], row["protect"]) == (mode, protect)]
            places = [i + 0.25 * (index - 1) for i in range(len(rows))]
            errors = [row["relative_l2"] for row in rows]
            axis.bar(places, errors, 0.25, yerr=[row["seed_spread"] for row in rows], color=colour, label=f"protect {protect}")
        axis.set_xticks(range(len(CHOICES)), [name.replace(", ", ",\n") for name in CHOICES], fontsize=8)
        axis.set_title(f"{mode}, about {TARGET:g}x fewer MACs", loc="left", fontsize=10)
        axis.set_ylabel("relative L2 against full compute")
    axes[0].legend(frameon=False, fontsize=8)
    for colour, name in zip(("#1b3a5c", "#f2b134"), ("v1, phase 2", "lagged"), strict=True):
        by_size = {
            size: [r["relative_l2"] for r in results["sizes"] if (r["name"], r["size"]) == (name, size)] for size in SIZES
        }
        means = [sum(errors) / len(errors) for errors in by_size.values()]
        axes[2].plot(SIZES, means, "o-", color=colour, label=name)
        axes[2].fill_between(SIZES, *([f(errors) for errors in by_size.values()] for f in (min, max)), color=colour, alpha=0.2)
    axes[2].set_xscale("log", base=2)
    axes[2].set_xticks(SIZES, [str(size) for size in SIZES])
    axes[2].set_xlabel("calibration samples")
    axes[2].set_title("modules: mean and range of three draws", loc="left", fontsize=10)
    axes[2].legend(frameon=False, fontsize=8)
    save_figure(path, figure)


def main() -> None:
    """Measure and write `ablations-<scheduler>-<steps>.json` and `.png`."""
    parser = host_options(__doc__)
    parser.add_argument("--calibration", type=int, default=16, help="samples where their number is not what is varied")
    arguments = parser.parse_args()
    host = Host.of(arguments)
    with Progress() as progress:
        stats = calibrate(
            host.model, host.scheduler, steps=host.steps, samples=arguments.calibration, seed=DRAWS[0], channels=False
        )
        tables = {"choices": choices(host, stats, progress), "sizes": sizes(host, progress)}
    show_rows("choices", tables["choices"], ("name", "fewer_macs", "relative_l2", "standard_error", "seed_spread"))
    show_rows("sizes", tables["sizes"], ("name", "size", "draw", "fewer_macs", "relative_l2", "agreement"))
    results = {**host.facts, "calibration_samples": arguments.calibration, **tables}
    path = arguments.out / f"ablations-{arguments.scheduler}-{arguments.steps}.json"
    write_record(path, arguments.device, results)
    plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
