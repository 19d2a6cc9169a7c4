"""What corrections are worth on glyph-dit: low-rank increments, forecasts, and rules for whole steps, against fewer steps.

    python -m stepgraph.bench.quality.corrections --scheduler ddim --steps 20 --out bench/results

Each row is one plan, measured as in `bench.quality.quality`: the relative L2 of the final image against full compute from the
same noise, at the multiply-accumulates that its graphs really compute. Factors, covariances and fitted coefficients come from
calibration runs with a seed of their own. `versus_fewer_steps` is the error over that of the same sampler in fewer steps at
equal MACs; below 1 the plan beats them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.progress import Progress

from stepgraph.bench.quality.corrections_plot import plot_corrections
from stepgraph.bench.quality.paired import Host, host_options
from stepgraph.bench.quality.quality import against_fewer_steps, fewer_steps, front
from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_rows
from stepgraph.compiler.calibration.calibrate import calibrate
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.forecast.correct_plan import forecast, lowrank
from stepgraph.compiler.forecast.fit_forecasts import fit_forecast, fit_whole_step, residual_affine
from stepgraph.compiler.lowrank.covariances import Covariances, measure_covariances
from stepgraph.compiler.lowrank.factorize import factorize
from stepgraph.plan import CachePlan
from stepgraph.plan.factors import Factors

SEED, SAMPLES = 1000, 16
RANKS = (8, 16, 32, 64)
Made = tuple[CachePlan, Factors | None]
# Name, setting, and what makes the plan.
Row = tuple[str, str, Callable[[], Made]]


@dataclass
class Workshop:
    """A host, and what plans on it are made of, each made once."""

    host: Host
    _factors: dict[tuple[Any, ...], Factors] = field(default_factory=dict)
    _covariances: dict[tuple[int, bool], Covariances] = field(default_factory=dict)

    @property
    def runs(self) -> dict[str, Any]:
        """The calibration runs of whatever is fitted."""
        return self.host.fits(SAMPLES, SEED)

    @property
    def planned(self) -> dict[str, Any]:
        """The steps of the plans, and what their pipeline sets."""
        return {"steps": self.host.steps, "schedule": self.host.schedule(self.host.steps)}

    @cached_property
    def stats(self) -> CalibrationStats:
        """Per-channel statistics."""
        return calibrate(self.host.model, self.host.scheduler, **self.planned, **self.runs)

    def interval(self, every: int, *kinds: str) -> CachePlan:
        """Everything of some kinds reused but at every `every`-th step."""
        return make_plan(
            "interval", model=self.host.model, scheduler=self.host.scheduler, steps=self.host.steps, every=every,
            kinds=list(kinds) or None, example_inputs=self.host.example(2),
            schedule=self.host.schedule(self.host.steps),
        )  # fmt: skip

    def factors(self, method: str, rank: int, period: int = 2) -> Factors:
        """Factors of all linear maps, or of whole modules."""
        key = (method, rank, period)
        if key not in self._factors:
            source: CalibrationStats | Covariances | None = None
            if method in ("ca", "cd"):
                source = self.stats
            elif method in ("cov", "whole"):
                source = self.covariances(period, method == "whole")
            self._factors[key] = factorize(self.host.model, source, method=method, rank=rank)
        return self._factors[key]

    def covariances(self, period: int, whole: bool) -> Covariances:
        """Of the increments of a period."""
        if (period, whole) not in self._covariances:
            self._covariances[period, whole] = measure_covariances(
                self.host.model, self.host.scheduler, period=period, whole=whole, **self.planned, **self.runs
            )
        return self._covariances[period, whole]

    def refined(self, method: str, rank: int, period: int = 2) -> Factors:
        """Factors made once more, on the runs of the plan that `factors` corrects."""
        source = measure_covariances(
            self.host.model, self.host.scheduler, plan=lowrank(self.interval(period)),
            factors=self.factors(method, rank, period), whole=method == "whole", **self.runs,
        )  # fmt: skip
        return factorize(self.host.model, source, method=method, rank=rank)

    def whole_step(self, plan: CachePlan, factors: Factors | None = None) -> CachePlan:
        """The plan with its skipped steps fitted."""
        return fit_whole_step(plan, self.host.model, self.host.scheduler, factors=factors, **self.runs)

    def fitted(self, plan: CachePlan, *terms: str) -> CachePlan:
        """The plan with fitted scalars for every reused site."""
        return fit_forecast(plan, self.host.model, self.host.scheduler, terms=terms, **self.runs)

    def on_computed_steps(self, every: int, corrected: str) -> CachePlan:
        """Every other step skipped; on the steps between, modules computed at every `every`-th and `corrected` at the rest."""
        steps = self.host.steps
        modules = ["C" if step % 2 or (step // 2) % every == 0 else corrected for step in range(steps)]
        return make_plan(
            "manual", model=self.host.model, scheduler=self.host.scheduler, steps=steps,
            actions={"output": ("CR" * steps)[:steps], "attn": "".join(modules), "ff": "".join(modules)},
        )  # fmt: skip

    def routed(self, folder: Path, progress: Progress) -> CachePlan:
        """A plan of Learning-to-Cache, in pairs."""
        router = self.host.trained_router(progress, "training a router")
        router.save(folder / "router.safetensors")
        return make_plan(
            "l2c", model=self.host.model, scheduler=self.host.scheduler, steps=self.host.steps,
            router=str(folder / "router.safetensors"),
        )  # fmt: skip


def increments(shop: Workshop, periods: tuple[int, ...], ranks: tuple[int, ...]) -> Iterator[Row]:
    """Increment-calibrated caching, by method, rank and period."""
    for period in periods:
        yield "none", f"p{period}", partial(_plain, shop.interval, period)
        for method in ("svd", "ca", "cd", "cov"):
            for rank in ranks:
                yield method, f"p{period} r{rank}", partial(with_lowrank, shop, period, method, rank)


def forecasts(shop: Workshop) -> Iterator[Row]:
    """Forecasts per module, around which increments are taken, and of whole steps."""
    for period in (2, 3, 5):
        for order in (1, 2):
            yield f"Taylor {order}", f"p{period}", partial(with_forecast, shop, period, "taylor", order)
        yield "whole step", f"p{period}", partial(with_whole_step, shop, period)
        yield "Taylor 1, output", f"p{period}", partial(with_forecast, shop, period, "taylor", 1, "output")
    for period in (2, 3):
        for rank in (8, 16, 32):
            yield "Taylor 1 + cov", f"p{period} r{rank}", partial(with_lowrank, shop, period, "cov", rank, "taylor")
        yield "fitted, modules", f"p{period}", partial(_fitted, shop, period)
        yield "Adams-Bashforth 1", f"p{period}", partial(with_forecast, shop, period, "adams_bashforth", 1)


def further(shop: Workshop, folder: Path, progress: Progress) -> Iterator[Row]:
    """Compositions: whole modules, the stack's residual, module plans under the whole-step rule, a learned plan."""
    for rank in (16, 32):
        yield "whole modules", f"p2 r{rank}", partial(with_lowrank, shop, 2, "whole", rank)
    for period in (2, 3):
        yield "residual", f"p{period}", partial(_plain, shop.interval, period, "stack_residual")
        yield "residual, affine", f"p{period}", partial(_affine, shop, period)
        yield "residual, Taylor 1", f"p{period}", partial(with_forecast, shop, period, "taylor", 1, "stack_residual")
    for corrected, name in (("R", "modules reused"), ("F", "modules Taylor 1"), ("L", "cov")):
        yield f"whole step + {name}", f"p2x2{' r16' * (corrected == 'L')}", partial(_both, shop, corrected)
    routed = shop.routed(folder, progress)
    yield "Learning-to-Cache", "pairs", lambda: (routed, None)
    for rank in (8, 16, 32):
        yield "Learning-to-Cache + cov", f"pairs r{rank}", partial(_routed, shop, routed, rank)
    yield "Learning-to-Cache + Taylor 1", "pairs", lambda: (forecast(routed), None)


def refined(shop: Workshop) -> Iterator[Row]:
    """Factors fitted on full runs, and once more on the runs of the plan that they correct."""
    for method, name in (("whole", "whole modules"), ("cov", "cov")):
        for rank in (16, 32):
            yield name, f"p2 r{rank}", partial(with_lowrank, shop, 2, method, rank)
            yield f"{name}, own runs", f"p2 r{rank}", partial(_refined, shop, 2, method, rank)


def _plain(make: Callable[..., CachePlan], *arguments: Any) -> Made:
    return make(*arguments), None


def with_lowrank(shop: Workshop, period: int, method: str, rank: int, around: str | None = None) -> Made:
    """A period's plan with low-rank increments, and their factors."""
    return lowrank(shop.interval(period), around=around), shop.factors(method, rank, period)


def _refined(shop: Workshop, period: int, method: str, rank: int) -> Made:
    return lowrank(shop.interval(period)), shop.refined(method, rank, period)


def with_forecast(shop: Workshop, period: int, rule: str, order: int, *kinds: str) -> Made:
    """A period's plan with forecasts."""
    return forecast(shop.interval(period, *kinds), rule, order), None


def with_whole_step(shop: Workshop, period: int) -> Made:
    """A period's plan with its skipped steps fitted."""
    return shop.whole_step(shop.interval(period, "output")), None


def _fitted(shop: Workshop, period: int) -> Made:
    return shop.fitted(shop.interval(period), "y1", "y2"), None


def _affine(shop: Workshop, period: int) -> Made:
    return residual_affine(shop.interval(period, "stack_residual"), shop.host.model, shop.host.scheduler, **shop.runs)


def _both(shop: Workshop, corrected: str) -> Made:
    plan = shop.on_computed_steps(2, "R" if corrected == "F" else corrected)
    factors = shop.factors("cov", 16, 4) if corrected == "L" else None
    return shop.whole_step(forecast(plan, kinds=["attn", "ff"]) if corrected == "F" else plan, factors), factors


def _routed(shop: Workshop, plan: CachePlan, rank: int) -> Made:
    return lowrank(plan), shop.factors("cov", rank)


def measure(host: Host, progress: Progress, part: str, folder: Path) -> list[dict[str, Any]]:
    """All rows of a part."""
    shop = Workshop(host)
    makers: dict[str, Callable[[], Iterator[Row]]] = {
        "increments": lambda: increments(shop, (2, 3), RANKS),
        "forecasts": lambda: forecasts(shop),
        "further": lambda: further(shop, folder, progress),
        "refined": lambda: refined(shop),
    }
    rows = [host.fewer_steps(count) for count in fewer_steps(host.steps)]
    rows += corrected_rows(host, makers[part](), progress)
    against_fewer_steps(rows)
    return rows


def corrected_rows(host: Host, made: Iterable[Row], progress: Progress) -> Iterator[dict[str, Any]]:
    """One row after the other."""
    bar = progress.add_task("corrections", total=None)
    for name, setting, make in made:
        progress.update(bar, description=f"{name} {setting}", advance=1)
        plan, factors = make()
        executable = host.compiled(plan, factors)
        facts = {"name": name, "setting": setting, "target": None, "fewer_macs": executable.macs().ideal_speedup}
        slots = executable.memory().peak_slot_bytes / executable.default.batch
        yield {**facts, "slot_bytes": slots, **host.compare(host.images(executable))}


def main() -> None:
    """Measure and write `corrections-<part>-<scheduler>-<steps>.json` and `.png` for every part."""
    parser = host_options(__doc__)
    parser.add_argument("--parts", nargs="*", default=["increments", "forecasts", "further", "refined"])
    arguments = parser.parse_args()
    host = Host.of(arguments)
    columns = ("name", "setting", "fewer_macs", "relative_l2", "standard_error", "seed_spread", "psnr", "versus_fewer_steps")
    for part in arguments.parts:
        with Progress() as progress, TemporaryDirectory() as folder:
            rows = measure(host, progress, part, Path(folder))
        results = {
            **host.facts, "seeds": list(host.seeds), "calibration_samples": SAMPLES, "part": part, "rows": rows,
        }  # fmt: skip
        show_rows(f"glyph-dit, {results['scheduler']} {host.steps}, N = {host.count}", rows, columns)
        path = arguments.out / f"corrections-{part}-{arguments.scheduler}-{arguments.steps}.json"
        write_record(path, arguments.device, results)
        plot_corrections(results, front(rows), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
