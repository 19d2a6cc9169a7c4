"""What the policies cost in quality on flux-emoji, against fewer steps of Euler's method and of a solver of second order.

    python -m stepgraph.bench.quality.on_emoji --out bench/results

As `stepgraph.bench.quality.quality` and `.corrections` measure glyph-dit: the relative L2 of the final image against full
compute (28 steps of flow matching with guidance) from the same noise, its mean, 95th percentile and maximum. Captions and noise
of whatever is calibrated or fitted are of the calibration half, those of what is measured of the other one. `accuracy` is the
share of the pictures whose icon is among the five best guesses of the retrieval network.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DPMSolverMultistepScheduler
from rich.progress import Progress

from stepgraph.assets.emoji_captions import caption
from stepgraph.assets.flux_emoji import WordEncoder, load_retrieval, load_words, unpacked
from stepgraph.assets.image_classifier import ImageClassifier
from stepgraph.bench.emoji.captions import CALIBRATION, MEASURING, NOISE_SEEDS, captions_of
from stepgraph.bench.quality.corrections import Row, Workshop, corrected_rows, with_forecast, with_lowrank, with_whole_step
from stepgraph.bench.quality.paired import Host, host_options
from stepgraph.bench.quality.quality import KNOBS, against_fewer_steps, front, l2c, l2c_name, measure
from stepgraph.bench.quality.quality_plot import plot_quality
from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_rows
from stepgraph.compiler.calibration.calibrate import calibrate
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.models.flux import sigmas
from stepgraph.files.whole_file import writable_folder
from stepgraph.inputs import POSITIONS

SIZE = 32
SEED, SAMPLES = NOISE_SEEDS[CALIBRATION][0], 16
POLICIES = ("FORA (interval)", "interval, output", "MagCache", "SmoothCache", "InvarDiff", "InvarDiff, no phase 2")
METHODS = ("svd", "ca", "cd", "cov")


@dataclass
class EmojiHost(Host):
    """flux-emoji, its captions in turn."""

    name: ClassVar[str] = "flux-emoji"
    shape: ClassVar[tuple[int, ...]] = (64, 48)
    guesses: ClassVar[int] = 5

    @cached_property
    def encoder(self) -> WordEncoder:
        """The text encoder."""
        return load_words(device=self.device)

    @cached_property
    def icons(self) -> list[str]:
        """Names of all icons, in the order of the retrieval network's classes."""
        return load_retrieval()[1]

    def judge(self) -> ImageClassifier:
        """The retrieval network."""
        return load_retrieval()[0]

    def wanted(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """Captions of the measuring half."""
        chosen = self._chosen(MEASURING, self.count)
        conditioning = self._conditioning(chosen, guided=True)
        labels = torch.tensor([self.icons.index(name) for name, _ in chosen])
        return labels, {name: value for name, value in conditioning.items() if name not in POSITIONS}

    def fixed(self) -> dict[str, Any]:
        """Positions of the image's and the text's tokens."""
        return {name: value for name, value in self._conditioning([], guided=False).items() if name in POSITIONS}

    def schedule(self, steps: int) -> dict[str, Any]:
        """The sigmas that FluxPipeline sets."""
        return {"sigmas": list(sigmas(steps))}

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Tokens [B, 64, 48] as pixels."""
        return unpacked(latents)

    def fits(self, samples: int, seed: int) -> dict[str, Any]:
        """Runs of the calibration half."""
        return {**super().fits(samples, seed), "conditioning": self._calibration(samples, guided=True)}

    def watched(self, samples: int, seed: int) -> dict[str, Any]:
        """Runs of the calibration half."""
        return {**super().watched(samples, seed), "conditioning": self._calibration(samples, guided=False)}

    def trained_on(self, samples: int) -> dict[str, Any]:
        """Runs of the calibration half."""
        return {"conditioning": self._calibration(samples, guided=True), "schedule": self.schedule(self.steps)}

    def example(self, rows: int) -> dict[str, Any]:
        """Inputs of the model of this many rows."""
        return example_inputs(self.model, rows, self._calibration(rows, guided=False))

    def _calibration(self, count: int, guided: bool) -> dict[str, torch.Tensor]:
        return self._conditioning(self._chosen(CALIBRATION, count), guided)

    def _chosen(self, half: str, count: int) -> list[tuple[str, str]]:
        return list(itertools.islice(itertools.cycle(captions_of(half, self.icons)), count))

    def _conditioning(self, captions: Sequence[tuple[str, str]], guided: bool) -> dict[str, torch.Tensor]:
        return self.encoder.conditioning([caption(*pair) for pair in captions], SIZE, guided)


def second_order(host: EmojiHost) -> Iterator[dict[str, Any]]:
    """Full compute in fewer steps of DPM-Solver++ of second order, on flow matching (arXiv 2211.01095)."""
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=host.scheduler.config.shift, solver_order=2,
    )  # fmt: skip
    for count in (round(host.steps / 3), round(host.steps / 2), round(host.steps / 1.3)):
        compared = host.compare(host.images(host.model, count, scheduler=solver))
        yield {"name": "fewer steps, 2nd order", "fewer_macs": host.steps / count, "knob": count, **compared}


def corrections(shop: Workshop) -> Iterator[Row]:
    """Forecasts and low-rank increments of periods 2 and 3."""
    for period in (2, 3):
        yield "Taylor 1", f"p{period}", partial(with_forecast, shop, period, "taylor", 1)
        yield "whole step", f"p{period}", partial(with_whole_step, shop, period)
        for method in METHODS:
            yield f"LOWRANK {method}", f"p{period} r16", partial(with_lowrank, shop, period, method, 16)


def main() -> None:
    """Measure and write `quality-flux-emoji-<steps>.json` and `.png`."""
    parser = host_options(__doc__)
    parser.set_defaults(scheduler="flow-euler", steps=28, guidance=2.0)
    parser.add_argument("--only", nargs="*", default=list(POLICIES), help="names of policies of the quality benchmark")
    parser.add_argument("--routers", nargs="*", type=int, default=[1], help="L2C: routed steps after each full one")
    parser.add_argument("--kept", type=Path, default=Path("out/emoji"), help="where trained routers are kept and found again")
    arguments = parser.parse_args()
    host = EmojiHost.of(arguments, seeds=NOISE_SEEDS[MEASURING][:2])
    stats = calibrate(
        host.model, host.scheduler, schedule=host.schedule(host.steps), channels=False, **host.watched(SAMPLES, SEED)
    )
    with Progress() as progress:
        knobs = {name: KNOBS[name] for name in arguments.only}
        knobs |= {l2c_name(run): l2c(host, run, writable_folder(arguments.kept), progress) for run in arguments.routers}
        rows = measure(host, stats, progress, knobs)
        rows += second_order(host)
        rows += [{**row, "target": None} for row in corrected_rows(host, corrections(Workshop(host)), progress)]
        against_fewer_steps(rows)
    path = arguments.out / f"quality-flux-emoji-{host.steps}.json"
    results = {**host.facts, "seeds": list(host.seeds), "calibration_samples": SAMPLES, "rows": rows}
    write_record(path, arguments.device, results)
    plot_quality(results, front(rows), path.with_suffix(".png"))
    columns = ("name", "setting", "fewer_macs", "relative_l2", "p95", "largest", "psnr", "accuracy", "versus_fewer_steps")
    show_rows(f"flux-emoji, N = {host.count}", rows, columns)


if __name__ == "__main__":
    main()
