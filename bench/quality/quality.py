"""What the policies cost in quality on glyph-dit, against full compute and against fewer steps of the same sampler.

    python -m stepgraph.bench.quality.quality --scheduler ddim --steps 20 --out bench/results

Every plan's knob is set so that it computes about 1/2 or 1/3 of the MACs. All runs start from the same noise, in groups of
one seed each; the error is the relative L2 of the final image against full compute of the same sampler, with its standard error
over the images and the spread of the seeds' means. `fewer steps` is the same sampler run in fewer steps: the baseline that a
cache has to beat. `versus_fewer_steps` is a row's error over that of fewer steps at equal MACs (interpolated between the step
counts that no smaller one beats): below 1 the cache pays. `other seed` is full compute from other noise, which says how far
apart unrelated images are.

With --finalists N, full compute, fewer steps and the best plans at the first target are sampled again, N images each, for
classifier accuracy and Fréchet distance, which need thousands of images to mean anything. A table with the same settings that
lies in the output folder is not measured again.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.progress import Progress

from stepgraph.bench.quality.paired import BATCH, Host, host_options
from stepgraph.bench.quality.quality_plot import plot_quality
from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_rows
from stepgraph.compiler.calibration.calibrate import calibrate
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.errors import PlanError
from stepgraph.metrics import error_at_equal_macs
from stepgraph.plan import CachePlan

TARGETS = (2.0, 3.0)


@dataclass(frozen=True)
class Knob:
    """A policy with one number that trades quality for MACs, larger for fewer MACs.

    Attributes:
        make: (statistics, knob) -> plan.
        low: Smallest value.
        high: Largest value.
        whole: Whether only whole numbers make sense.
        phase2: Whether the plan is made once more with InvarDiff's second measurement, after the knob is set.
    """

    make: Callable[[CalibrationStats, float], CachePlan]
    low: float
    high: float
    whole: bool = False
    phase2: bool = False


def invardiff(modules_only: bool = False, phase2: bool = False, **arguments: Any) -> Knob:
    """InvarDiff with one quantile for the steps and a third of it for the modules, or for the modules alone."""

    def make(stats: CalibrationStats, x: float) -> CachePlan:
        taus = {"step": 0.0, "attn": x, "ff": x} if modules_only else {"step": x, "attn": x / 3, "ff": x / 3}
        return make_plan("invardiff", stats, phase2=False, **{**taus, **arguments})

    return Knob(make, 0, 1, phase2=phase2)


def whole(policy: str, name: str, low: int, high: int, **arguments: Any) -> Knob:
    """A policy whose knob is a whole number."""

    def make(stats: CalibrationStats, x: float) -> CachePlan:
        policy_arguments: dict[str, Any] = {**arguments, name: round(x)}
        return make_plan(policy, stats, **policy_arguments)

    return Knob(make, low, high, whole=True)


def smooth(policy: str, name: str, high: float, **arguments: Any) -> Knob:
    """A policy whose knob is a threshold."""

    def make(stats: CalibrationStats, x: float) -> CachePlan:
        policy_arguments: dict[str, Any] = {**arguments, name: x}
        return make_plan(policy, stats, **policy_arguments)

    return Knob(make, 0, high)


def by_budget(stats: CalibrationStats, x: float) -> CachePlan:
    """ProCache with a full step for every x steps, in segments as long as its paper's and no shorter than needed."""
    steps = len(stats.header.timesteps)
    return make_plan("procache", stats, budget=max(math.ceil(steps / 5), round(steps / x)), shortest=1, longest=5, candidates=5)


KNOBS: dict[str, Knob] = {
    "FORA (interval)": whole("interval", "every", 1, 8),
    "interval, hidden": whole("interval", "every", 1, 8, kinds=["hidden"]),
    "interval, output": whole("interval", "every", 1, 8, kinds=["output"]),
    "SmoothCache": smooth("smoothcache", "alpha", 4),
    "SmoothCache, per layer": smooth("smoothcache", "alpha", 4, per_layer=True),
    "MagCache": smooth("magcache", "threshold", 4, max_skip=5, retention=0.1),
    "TeaCache": smooth("teacache", "threshold", 4),
    "DeepCache, modules": whole("deepcache", "every", 1, 12),
    "DeepCache, output": whole("deepcache", "every", 1, 12, first=0, last=8, reuse="output"),
    "ProCache": Knob(by_budget, 1, 5),
    "InvarDiff": invardiff(phase2=True),
    "InvarDiff, no phase 2": invardiff(),
    "InvarDiff, modules": invardiff(modules_only=True, phase2=True),
    "InvarDiff, steps only": invardiff(attn=0.0, ff=0.0, phase2=True),
    "InvarDiff, lagged": invardiff(metric="lagged"),
    "InvarDiff, lagged, modules": invardiff(modules_only=True, metric="lagged"),
}


def l2c_name(run: int) -> str:
    """What the tables call Learning-to-Cache with `run` routed steps after each full one."""
    return f"L2C, {'pairs' if run == 1 else f'runs of {run}'}"


def l2c(host: Host, run: int, folder: Path, progress: Progress) -> Knob:
    """Learning-to-Cache with routers trained here for `run` routed steps after each full one; the knob is theta.

    Routers that lie in the folder are not trained again, and a training that was broken off there goes on.
    """
    path = folder / f"router-{host.name}-{host.scheduler_name}-{host.steps}-run{run}.safetensors"
    if not path.is_file():
        unfinished = path.with_suffix(".unfinished")
        host.trained_router(progress, f"training routers, runs of {run}", unfinished, run=run).save(path)
        unfinished.unlink()
    return Knob(lambda s, x: make_plan("l2c", s, theta=x, router=str(path)), 0, 1)


def tuned(knob: Knob, stats: CalibrationStats, target: float) -> tuple[float, CachePlan]:
    """The knob's value whose plan comes nearest to `target` times fewer MACs."""
    if knob.whole:
        values = [float(x) for x in range(int(knob.low), int(knob.high) + 1)]
    else:
        values, low, high = [], knob.low, knob.high
        for _ in range(20):
            middle = (low + high) / 2
            values.append(middle)
            low, high = (middle, high) if knob.make(stats, middle).summary().ideal_speedup < target else (low, middle)
    plans = [(abs(p.summary().ideal_speedup - target), value, p) for value in values for p in [knob.make(stats, value)]]
    nearest = min(plans, key=lambda entry: entry[0])
    return nearest[1], nearest[2]


def corrected(host: Host, stats: CalibrationStats, plan: CachePlan) -> CachePlan:
    """The plan with InvarDiff's phase 2."""
    arguments = {**plan.header.arguments, "phase2": True}
    runs = host.watched(stats.header.samples or 1, stats.header.seed or 0)
    return make_plan(
        "invardiff", stats, model=host.model, scheduler=host.scheduler, conditioning=runs.get("conditioning"), **arguments
    )


def front(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(share of the MACs, error) of the step counts that no smaller count beats, from cheap to dear.

    diffusers' DDIM steps by 1000 // steps, whatever its timesteps: counts that do not divide 1000 can be worse than smaller
    ones that do, and nobody would choose them.
    """
    best: list[tuple[float, float]] = []
    for share, error in sorted((1 / row["fewer_macs"], row["relative_l2"]) for row in rows if row["name"] == "fewer steps"):
        if not best or error < best[-1][1]:
            best.append((share, error))
    return best


def against_fewer_steps(rows: list[dict[str, Any]]) -> None:
    """Write into every plan's row its error over that of fewer steps at equal MACs."""
    points = front(rows)
    for row in rows:
        if "target" in row and "relative_l2" in row:
            equal = error_at_equal_macs(points, 1 / row["fewer_macs"])
            row["versus_fewer_steps"] = row["relative_l2"] / equal if equal else None


def fewer_steps(steps: int) -> list[int]:
    """The step counts to measure: every one from a quarter to three quarters of the steps, or every fifth of many."""
    low, high = max(2, round(steps / 4.4)), round(steps / 1.3)
    return sorted({*range(low, high + 1, 1 if steps <= 25 else 5), round(steps / 2), round(steps / 3)})


def measure(host: Host, stats: CalibrationStats, progress: Progress, knobs: dict[str, Knob]) -> list[dict[str, Any]]:
    """All rows."""
    counts = fewer_steps(host.steps)
    bar = progress.add_task("", total=len(counts) + 1 + len(TARGETS) * len(knobs))
    other = replace(host, seeds=[1000 + seed for seed in host.seeds])
    rows = [{"name": "other seed", "fewer_macs": 1.0, **host.compare(other.reference)}]
    progress.advance(bar)
    for count in counts:
        progress.update(bar, description=f"{count} steps", advance=1)
        rows.append(host.fewer_steps(count))
    for target in TARGETS:
        for name, knob in knobs.items():
            progress.update(bar, description=f"{name} {target:g}x", advance=1)
            try:
                value, plan = tuned(knob, stats, target)
            except PlanError as error:
                rows.append({"name": name, "target": target, "impossible": str(error)})
                continue
            plan = corrected(host, stats, plan) if knob.phase2 else plan
            fewer = plan.summary().ideal_speedup
            row = {
                "name": name,
                "target": target,
                "fewer_macs": fewer,
                "knob": value,
                **host.compare(host.images(host.compiled(plan))),
            }
            rows.append({**row, "rows": list(plan.rows)})
    against_fewer_steps(rows)
    return rows


def finalists(arguments: argparse.Namespace, rows: list[dict[str, Any]], stats: CalibrationStats, progress: Progress) -> Any:
    """Accuracy and Fréchet distances over many images: full compute, fewer steps, the best plans of the first target."""
    host = Host(arguments.scheduler, arguments.steps, arguments.guidance, [7000], arguments.finalists, arguments.device)
    real = host.real_features()
    at_target = [row for row in rows if row.get("target") == TARGETS[0] and "relative_l2" in row]
    # A plan that misses the target's MACs by far is no rival of the others.
    near = [row for row in at_target if abs(row["fewer_macs"] / TARGETS[0] - 1) < 0.12]
    # Two policies can come to the same plan.
    best = list({tuple(row["rows"]): row for row in sorted(near, key=lambda row: row["relative_l2"])}.values())[
        : arguments.best
    ]
    bar = progress.add_task("finalists", total=(1 + len(best)) * -(-host.count // BATCH))
    rows_found = [{"name": "full", "fewer_macs": 1.0, **host.compare(host.reference), **host.frechet(host.reference, real)}]
    count = round(arguments.steps / TARGETS[0])
    runs: list[tuple[str, float, Any, int]] = [("fewer steps", arguments.steps / count, host.model, count)]
    for row in best:
        plan = CachePlan(stats.header, stats.sites, tuple(row["rows"]))
        runs.append((row["name"], row["fewer_macs"], host.compiled(plan), arguments.steps))
    for name, fewer, runner, steps in runs:
        images = host.images(runner, steps, on_batch=lambda: progress.advance(bar))
        rows_found.append({"name": name, "fewer_macs": fewer, **host.compare(images), **host.frechet(images, real)})
    return {"images": host.count, "rows": rows_found}


def table_in(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The rows of a record that was made with the same settings, and where they are from; no rows where there is none."""
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        results = record["results"]
        if all(results.get(name) == value for name, value in settings.items()):
            origin = {name: record[name] for name in ("commit", "command")}
            return {"rows": results["rows"], "rows_from": results.get("rows_from", origin)}
    return {"rows": []}


def main() -> None:
    """Measure and write `quality-<scheduler>-<steps>.json` and `.png`."""
    parser = host_options(__doc__, samples=256)
    parser.add_argument("--finalists", type=int, default=0)
    parser.add_argument("--best", type=int, default=3, help="how many plans are finalists")
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=list(KNOBS), help="names of policies, in this file")
    parser.add_argument("--routers", nargs="*", type=int, default=[1, 2, 3], help="L2C: routed steps after each full one")
    arguments = parser.parse_args()
    host = Host.of(arguments)
    stats = calibrate(
        host.model, host.scheduler, steps=arguments.steps, channels=False, **host.watched(arguments.calibration, 1000)
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"quality-{arguments.scheduler}-{arguments.steps}.json"
    results = {**host.facts, "seeds": list(host.seeds), "calibration_samples": arguments.calibration}
    with Progress() as progress, TemporaryDirectory() as folder:
        # The finalists take as long again: the table is kept before them, and a second call goes on from it.
        results |= table_in(path, results)
        if not results["rows"]:
            knobs = {name: KNOBS[name] for name in arguments.only}
            for run in arguments.routers:
                knobs[l2c_name(run)] = l2c(host, run, Path(folder), progress)
            results["rows"] = measure(host, stats, progress, knobs)
            write_record(path, arguments.device, results)
            plot_quality(results, front(results["rows"]), path.with_suffix(".png"))
        if arguments.finalists:
            results["finalists"] = finalists(arguments, results["rows"], stats, progress)
            write_record(path, arguments.device, results)
    name = f"{results['scheduler']} {arguments.steps}, guidance {arguments.guidance:g}, N = {host.count}"
    columns = ("fewer_macs", "relative_l2", "standard_error", "seed_spread", "psnr", "feature_distance", "versus_fewer_steps")
    show_rows(f"glyph-dit, {name}", results["rows"], ("name", *columns, "knob"))
    if arguments.finalists:
        final = results["finalists"]
        show_rows(f"N = {final['images']}", final["rows"], ("name", *columns[:2], "accuracy", "frechet_real", "frechet_full"))


if __name__ == "__main__":
    main()
