"""What forecasts are worth on glyph-dit: formulas and fits, for modules, the block stack's residual and whole steps.

    python -m stepgraph.bench.quality.forecasts --scheduler ddim --steps 20 --out bench/results

Every row is a plan with a fixed period, measured as in `bench.quality.quality` on noise that no fit has seen. `versus_taylor`
is its error over that of TaylorSeer of order 1 on every module at the same period. With the scheduler flow-euler the model is
converted (`bench.glyphs.flow_glyphs`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from torch import nn

from stepgraph.bench.glyphs.flow_glyphs import flow_model
from stepgraph.bench.quality.paired import Host, host_options
from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_rows
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.forecast.correct_plan import forecast
from stepgraph.compiler.forecast.fit_forecasts import fit_forecast, fit_whole_step, residual_affine
from stepgraph.files.whole_file import save_figure
from stepgraph.plan import CachePlan
from stepgraph.plan.corrections import Forecast
from stepgraph.plan.factors import Factors

SEED = 77
TAYLOR = "modules, taylor 1"
Made = CachePlan | tuple[CachePlan, Factors]


class FlowHost(Host):
    """glyph-dit as a flow-matching model."""

    def loaded(self) -> nn.Module:
        """The converted model."""
        return flow_model(super().loaded())


class Bench:
    """A host with what is fitted on it."""

    def __init__(self, host: Host, samples: int) -> None:
        self.host = host
        self.fit: dict[str, Any] = {"samples": samples, "seed": SEED, "guidance_scale": host.guidance}

    def plan(self, every: int, steps: int | None = None, kinds: Sequence[str] = ("attn", "ff")) -> CachePlan:
        """A period's plan."""
        host = self.host
        return make_plan(
            "interval", model=host.model, scheduler=host.scheduler, steps=steps or host.steps, every=every, kinds=list(kinds)
        )

    def skipping(self, every: int, steps: int | None = None) -> CachePlan:
        """A period's plan that skips whole steps."""
        return self.plan(every, steps, ["output"])

    def whole(self, plan: CachePlan, **options: Any) -> CachePlan:
        """The fitted whole-step rule."""
        return fit_whole_step(plan, self.host.model, self.host.scheduler, **self.fit | options)

    def sites(self, plan: CachePlan, **options: Any) -> CachePlan:
        """Fitted scalars."""
        return fit_forecast(plan, self.host.model, self.host.scheduler, **self.fit | options)

    def affine(self, plan: CachePlan) -> Made:
        """Scale and shift on the residual."""
        return residual_affine(plan, self.host.model, self.host.scheduler, **self.fit)

    def measured(self, made: Made, **facts: Any) -> dict[str, Any]:
        """A row."""
        plan, factors = made if isinstance(made, tuple) else (made, None)
        exe = self.host.compiled(plan, factors)
        held = exe.memory().peak_slot_bytes / exe.default.batch
        figures = {"fewer_macs": plan.summary().ideal_speedup, "slot_bytes": held, **self.host.compare(self.host.images(exe))}
        return {**facts, **figures}


def methods(bench: Bench, every: int) -> dict[str, Callable[[], Made]]:
    """The rows of a period by name."""
    modules, output = bench.plan(every), bench.skipping(every)
    residual = bench.plan(every, kinds=["stack_residual"])
    rows: dict[str, Callable[[], Made]] = {"modules, reused": lambda: modules}
    for order in range(1, 5):
        rows[f"modules, taylor {order}"] = lambda order=order: forecast(modules, "taylor", order)  # type: ignore[misc]
    rows |= {
        "modules, polynomial 2": lambda: forecast(modules, "polynomial", 2),
        "modules, Adams-Bashforth 1": lambda: forecast(modules, "adams_bashforth", 1),
        "modules, fitted": lambda: bench.sites(modules),
        "residual, reused": lambda: residual,
        "residual, taylor 1": lambda: forecast(residual),
        "residual, fitted": lambda: bench.sites(residual),
        "residual, affine": lambda: bench.affine(residual),
        "whole step, reused": lambda: output,
        "whole step, taylor 1": lambda: forecast(output),
        "whole step, fitted": lambda: bench.whole(output),
        "whole step, fitted to outputs": lambda: bench.whole(output, target="own"),
    }
    return rows


def by_period(bench: Bench, periods: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
    """All methods at all periods."""
    rows = []
    for every in periods:
        chosen = methods(bench, every)
        bar = progress.add_task("", total=len(chosen))
        for name, make in chosen.items():
            progress.update(bar, description=f"period {every}: {name}", advance=1)
            rows.append(bench.measured(make(), name=name, every=every))
        period_rows = [row for row in rows if row["every"] == every]
        taylor = next(row["relative_l2"] for row in period_rows if row["name"] == TAYLOR)
        for row in period_rows:
            row["versus_taylor"] = row["relative_l2"] / taylor
    return rows


def with_modules(bench: Bench, progress: Progress) -> list[dict[str, Any]]:
    """The rule on half of the steps, and modules forecast on every second one of those that it leaves."""
    host, rows = bench.host, []
    letters = {"output": "CF", "modules": "CCRR"}
    bar = progress.add_task("", total=3)
    actions = {name: (pattern * host.steps)[: host.steps] for name, pattern in letters.items()}
    for name in ("rule alone", "rule and reused modules", "rule and modules, taylor 1"):
        progress.update(bar, description=name, advance=1)
        kinds = {} if name == "rule alone" else {"attn": actions["modules"], "ff": actions["modules"]}
        plan = make_plan(
            "manual", model=host.model, scheduler=host.scheduler, steps=host.steps,
            actions={"output": actions["output"].replace("F", "R"), **kinds},
        )  # fmt: skip
        plan = forecast(plan, kinds=["attn", "ff"]) if "taylor" in name else plan
        rows.append(bench.measured(bench.whole(plan), name=name))
    rows.append(bench.measured(bench.whole(bench.skipping(3)), name="rule alone, period 3"))
    rows.append(bench.measured(bench.whole(bench.skipping(4)), name="rule alone, period 4"))
    return rows


def settings(bench: Bench, every: int, progress: Progress) -> list[dict[str, Any]]:
    """The rule's coefficients: calibration's size, terms, guidance, and another number of steps."""
    plan, rows = bench.skipping(every), []
    chosen: dict[str, dict[str, Any]] = {f"{n} samples": {"samples": n} for n in (1, 2, 4, 8, 16, 32)}
    chosen |= {f"guidance {g:g}": {"guidance_scale": g} for g in (1.0, 2.5)}
    chosen |= {f"terms {' '.join(terms)}": {"terms": terms} for terms in (("y1",), ("y1", "y2"), ("y1", "x0", "x1"))}
    bar = progress.add_task("", total=len(chosen) + 1)
    for name, options in chosen.items():
        progress.update(bar, description=f"{name}", advance=1)
        rows.append(bench.measured(bench.whole(plan, **options), name=name, every=every))
    other = bench.whole(bench.skipping(every, steps=round(0.8 * bench.host.steps)))
    rows.append(bench.measured(transferred(other, plan), name=f"from {other.header.steps} steps", every=every))
    progress.advance(bar)
    return rows


def transferred(fitted: CachePlan, plan: CachePlan) -> CachePlan:
    """A plan of the same period with the coefficients of another number of steps.

    Every coefficient is interpolated over the relative position in the run, among the steps equally far behind their last
    computed step and with the same terms; where there are none, the last computed step's output stays.
    """
    i = plan.index("output")
    known: dict[tuple[int, tuple[str, ...]], list[tuple[float, tuple[float, ...]]]] = {}
    for (step, _), fit in sorted(fitted.forecasts.items()):
        known.setdefault((_behind(fitted, step), fit.terms), []).append((step / (fitted.steps - 1), fit.coefficients[0]))
    forecasts = {}
    for step, row in enumerate(plan.rows):
        if row[i] == "C":
            continue
        terms = ("y1", "y2", "x0", "x1") if sum(r[i] == "C" for r in plan.rows[:step]) > 1 else ("y1", "x0", "x1")
        points = known.get((_behind(plan, step), terms))
        if points is None:
            forecasts[step, i] = Forecast(("y1",), ((1.0,),))
            continue
        places, values = zip(*points, strict=True)
        coefficients = [float(np.interp(step / (plan.steps - 1), places, column)) for column in zip(*values, strict=True)]
        forecasts[step, i] = Forecast(terms, (tuple(coefficients),))
    rows = tuple(row[:i] + row[i].replace("R", "F") + row[i + 1 :] for row in plan.rows)
    return replace(plan, rows=rows, forecasts=forecasts)


def _behind(plan: CachePlan, step: int) -> int:
    """How many steps ago the last computed one was."""
    i = plan.index("output")
    return next(back for back in range(1, step + 1) if plan.rows[step - back][i] == "C")


def plot(results: dict[str, Any], path: Path) -> None:
    """Error over period, one line per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    styles = {"modules": ("#1b3a5c", "o"), "residual": ("#f2b134", "s"), "whole step": ("#c8553d", "^")}
    names = list(dict.fromkeys(row["name"] for row in results["methods"]))
    for name in names:
        rows = [row for row in results["methods"] if row["name"] == name]
        group, _, what = name.partition(", ")
        colour, marker = styles[group]
        best = what in ("fitted", "taylor 1")
        axis.plot(
            [row["every"] for row in rows], [row["relative_l2"] for row in rows], marker=marker, color=colour, label=name,
            linestyle="-" if best else ":", alpha=1 if best else 0.5, markersize=4,
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set_xticks(sorted({row["every"] for row in results["methods"]}))
    axis.set_xlabel("period: one computed step in this many")
    axis.set_ylabel("relative L2 against full compute")
    title = f"glyph-dit, {results['scheduler']} {results['steps']}, guidance {results['guidance_scale']:g}"
    axis.set_title(title, loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=7, ncols=2)
    save_figure(path, figure)


def main() -> None:
    """Measure and write `forecasts-<scheduler>-<steps>.json` and `.png`."""
    parser = host_options(__doc__, out="out/forecasts")
    parser.add_argument("--periods", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--calibration", type=int, default=16, help="samples that fits are made on")
    parser.add_argument("--settings", type=int, default=3, help="period at which the rule's settings are varied; 0 for none")
    arguments = parser.parse_args()
    kind = FlowHost if arguments.scheduler.startswith("flow") else Host
    host = kind.of(arguments)
    bench = Bench(host, arguments.calibration)
    columns = ("fewer_macs", "relative_l2", "standard_error", "seed_spread")
    with Progress() as progress:
        tables: dict[str, Any] = {"methods": by_period(bench, arguments.periods, progress)}
        if arguments.settings:
            tables["with_modules"] = with_modules(bench, progress)
            tables["settings"] = settings(bench, arguments.settings, progress)
    show_rows("methods", tables["methods"], ("name", "every", *columns, "versus_taylor"))
    for name in set(tables) - {"methods"}:
        show_rows(name, tables[name], ("name", *columns))
    results = {**host.facts, "calibration_samples": arguments.calibration, "calibration_seed": SEED, **tables}
    path = arguments.out / f"forecasts-{arguments.scheduler}-{arguments.steps}.json"
    write_record(path, arguments.device, results)
    plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
