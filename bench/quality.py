"""What the policies cost in quality on glyph-dit, against full compute and against fewer steps of the same sampler.

    python -m stepgraph.bench.quality --scheduler ddim --steps 20 --samples 256 --out out/quality

Every plan's knob is set so that it computes about 1/2 or 1/3 of the MACs. All runs start from the same noise; the error is the
relative L2 of the final image against full compute of the same sampler, with its standard error over the samples. `fewer steps`
is the same sampler run in fewer steps at equal MACs: the baseline that a cache has to beat. `other seed` is full compute from
other noise: how far apart unrelated images are.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stepgraph.bench.glyph_runs import GlyphRuns
from stepgraph.bench.record import write_record
from stepgraph.compiler.calibrate import calibrate
from stepgraph.compiler.make_plan import make_plan
from stepgraph.compiler.stats import CalibrationStats
from stepgraph.glyphs import accuracy, load_classifier
from stepgraph.metrics import psnr
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


KNOBS = {
    "interval (FORA)": Knob(lambda s, x: make_plan("interval", s, every=int(x)), 1, 8, whole=True),
    "interval, hidden": Knob(lambda s, x: make_plan("interval", s, every=int(x), kinds=["hidden"]), 1, 8, whole=True),
    "interval, output": Knob(lambda s, x: make_plan("interval", s, every=int(x), kinds=["output"]), 1, 8, whole=True),
    "smoothcache": Knob(lambda s, x: make_plan("smoothcache", s, alpha=x), 0, 4),
    "smoothcache, per layer": Knob(lambda s, x: make_plan("smoothcache", s, alpha=x, per_layer=True), 0, 4),
    "magcache": Knob(lambda s, x: make_plan("magcache", s, threshold=x, max_skip=5, retention=0.1), 0, 4),
    "invardiff, steps and modules": Knob(
        lambda s, x: make_plan("invardiff", s, step=x, attn=x / 3, ff=x / 3, phase2=False), 0, 1
    ),
    "invardiff, steps and modules, phase 2": Knob(
        lambda s, x: make_plan("invardiff", s, step=x, attn=x / 3, ff=x / 3, phase2=False), 0, 1, phase2=True
    ),
    "invardiff, modules": Knob(lambda s, x: make_plan("invardiff", s, step=0.0, attn=x, ff=x, phase2=False), 0, 1),
    "invardiff, lagged metric": Knob(
        lambda s, x: make_plan("invardiff", s, step=0.0, attn=x, ff=x, metric="lagged", phase2=False), 0, 1
    ),
}


def tuned(knob: Knob, stats: CalibrationStats, target: float) -> tuple[float, CachePlan]:
    """The knob's value whose plan comes nearest to `target` times fewer MACs."""
    if knob.whole:
        values = [float(x) for x in range(int(knob.low), int(knob.high) + 1)]
    else:
        values, low, high = [], knob.low, knob.high
        for _ in range(24):
            middle = (low + high) / 2
            values.append(middle)
            low, high = (middle, high) if knob.make(stats, middle).summary().ideal_speedup < target else (low, middle)
    plans = [
        (abs(plan.summary().ideal_speedup - target), value, plan) for value in values for plan in [knob.make(stats, value)]
    ]
    nearest = min(plans, key=lambda entry: entry[0])
    return nearest[1], nearest[2]


def main() -> None:
    """Measure and write `quality-<scheduler>-<steps>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    arguments = parser.parse_args()
    device, steps, count = arguments.device, arguments.steps, arguments.samples
    runs = GlyphRuns(arguments.scheduler, steps, count, arguments.guidance, device)
    model, scheduler, labels, images, reference = runs.model, runs.scheduler, runs.labels, runs.images, runs.reference
    classifier = load_classifier()
    features = classifier.features(reference.clamp(-1, 1))

    def row(name: str, macs: float, result: torch.Tensor, **extra: Any) -> dict[str, Any]:
        errors = runs.errors(result)
        distance = (classifier.features(result.clamp(-1, 1)) - features).norm(dim=1).mean()
        return {
            "name": name,
            "fewer_macs": macs,
            "relative_l2": float(errors.mean()),
            "standard_error": float(errors.std() / count**0.5),
            "psnr": psnr(result, reference),
            "feature_distance": float(distance),
            "accuracy": accuracy(classifier, result, labels),
            **extra,
        }

    with torch.no_grad(), Progress() as progress:
        bar = progress.add_task("calibrating", total=len(TARGETS) * (len(KNOBS) + 1) + 1)
        stats = calibrate(model, scheduler, steps=steps, samples=arguments.calibration, seed=1000)
        rows = [row("other seed", 1.0, images(model, steps, seed=1))]
        progress.advance(bar)
        for target in TARGETS:
            fewer = round(steps / target)
            progress.update(bar, description=f"fewer steps {target:g}x", advance=1)
            rows.append(row("fewer steps", steps / fewer, images(model, fewer), target=target, knob=fewer))
            for name, knob in KNOBS.items():
                progress.update(bar, description=f"{name} {target:g}x", advance=1)
                value, plan = tuned(knob, stats, target)
                if knob.phase2:
                    fixed = {**plan.header.arguments, "phase2": True}
                    plan = make_plan("invardiff", stats, model=model, scheduler=scheduler, **fixed)
                executable = runs.compiled(plan)
                rows.append(row(name, executable.macs().ideal_speedup, images(executable, steps), target=target, knob=value))
    table = Table(title=f"glyph-dit, {type(scheduler).__name__} {steps}, guidance {arguments.guidance:g}, N = {count}")
    columns = ("fewer_macs", "relative_l2", "standard_error", "psnr", "feature_distance", "accuracy", "knob")
    for column in ("", *columns):
        table.add_column(column.replace("_", " "), justify="right" if column else "left")
    for entry in rows:
        table.add_row(entry["name"], *(f"{entry[c]:.4g}" if c in entry else "" for c in columns))
    Console(width=130).print(table)
    results = {
        "model": "glyph-dit", "scheduler": type(scheduler).__name__, "steps": steps, "samples": count,
        "guidance_scale": arguments.guidance, "calibration_samples": arguments.calibration, "rows": rows,
    }  # fmt: skip
    write_record(arguments.out / f"quality-{arguments.scheduler}-{steps}.json", device, results)


if __name__ == "__main__":
    main()
