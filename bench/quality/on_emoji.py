"""What the policies cost in quality on flux-emoji, against fewer steps of Euler's method and of a solver of second order.

    python -m stepgraph.bench.quality.on_emoji --out bench/results

As `stepgraph.bench.quality.quality` and `.corrections` measure glyph-dit: the relative L2 of the final image against full
compute (28 steps of flow matching with guidance) from the same noise, its mean, 95th percentile and maximum. Captions and noise
of whatever is calibrated or fitted are of the calibration half, those of what is measured of the other one. `accuracy` is the
share of the pictures whose icon is among the five best guesses of the retrieval network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import DPMSolverMultistepScheduler
from rich.progress import Progress
from torch import nn

from stepgraph.assets.flux_emoji import load_flux_emoji, load_retrieval, positions, unpacked
from stepgraph.assets.image_classifier import ImageClassifier
from stepgraph.bench.emoji.captions import CALIBRATION, MEASURING, NOISE_SEEDS, caption, captions_of
from stepgraph.bench.quality.corrections import Row, Workshop, corrected_rows
from stepgraph.bench.quality.paired import Host, host_options
from stepgraph.bench.quality.quality import KNOBS, against_fewer_steps, front, measure
from stepgraph.bench.quality.quality_plot import plot_quality
from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_rows
from stepgraph.compiler.calibration.calibrate import calibrate
from stepgraph.compiler.forecast.correct_plan import forecast, lowrank
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.models.flux import sigmas

SIZE = 32
SEED, SAMPLES = NOISE_SEEDS[CALIBRATION][0], 16
POLICIES = ("FORA (interval)", "interval, output", "MagCache", "SmoothCache", "InvarDiff", "InvarDiff, no phase 2")


@dataclass
class EmojiHost(Host):
    """flux-emoji under Euler's method, its captions in turn."""

    name: ClassVar[str] = "flux-emoji"
    shape: ClassVar[tuple[int, ...]] = (64, 48)
    guesses: ClassVar[int] = 5

    def loaded(self) -> nn.Module:
        """The transformer; the rest of the pipeline is kept beside it."""
        self.pipe, self.encoder = load_flux_emoji(device=self.device)
        transformer: nn.Module = self.pipe.transformer
        return transformer

    def sampler(self) -> Any:
        """The pipeline's own."""
        return self.pipe.scheduler

    def judge(self) -> ImageClassifier:
        """The retrieval network."""
        network, self.icons = load_retrieval()
        return network

    def wanted(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """Captions of the measuring half."""
        chosen = self._captions(MEASURING, self.count)
        labels = torch.tensor([self.icons.index(name) for name, _ in chosen])
        return labels, self._encoded(chosen, guided=True)

    def schedule(self, steps: int) -> dict[str, Any]:
        """The sigmas that FluxPipeline sets."""
        return {"sigmas": list(sigmas(steps))}

    def fixed(self) -> dict[str, Any]:
        """Positions of the image's and the text's tokens."""
        text_ids = torch.zeros(self.encoder.config.length, 3, device=self.device)
        return {"img_ids": positions(SIZE, self.device), "txt_ids": text_ids}

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Tokens [B, 64, 48] as pixels."""
        return unpacked(latents)

    def fits(self, samples: int, seed: int) -> dict[str, Any]:
        """Runs of the calibration half, with guidance."""
        chosen = self._captions(CALIBRATION, samples)
        return {**super().fits(samples, seed), "conditioning": {**self._encoded(chosen, guided=True), **self.fixed()}}

    def unguided(self, samples: int, seed: int) -> dict[str, Any]:
        """The same, as policies are calibrated: conditional, without guidance."""
        chosen = self._captions(CALIBRATION, samples)
        conditioning = {**self._encoded(chosen, guided=False), **self.fixed()}
        return {"samples": samples, "seed": seed, "conditioning": conditioning}

    def example(self, rows: int) -> dict[str, Any]:
        """Inputs of the model of this many rows."""
        conditioning = {**self._encoded(self._captions(CALIBRATION, rows), guided=False), **self.fixed()}
        return example_inputs(self.model, rows, conditioning)

    def _captions(self, half: str, count: int) -> list[tuple[str, str]]:
        captions = captions_of(half, self.icons)
        return [captions[place % len(captions)] for place in range(count)]

    def _encoded(self, captions: Sequence[tuple[str, str]], guided: bool) -> dict[str, torch.Tensor]:
        prompts = {"": [caption(*pair) for pair in captions]} | ({"negative_": [""] * len(captions)} if guided else {})
        conditioning = {}
        for prefix, texts in prompts.items():
            encoded = self.encoder.encode(texts)
            conditioning[f"{prefix}encoder_hidden_states"] = encoded["prompt_embeds"]
            conditioning[f"{prefix}pooled_projections"] = encoded["pooled_prompt_embeds"]
        return conditioning


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
        yield "Taylor 1", f"p{period}", partial(_forecast, shop, period)
        yield "whole step", f"p{period}", partial(_whole_step, shop, period)
        for method in ("svd", "ca", "cd", "cov"):
            yield f"LOWRANK {method}", f"p{period} r16", partial(_lowrank, shop, period, method)


def _forecast(shop: Workshop, period: int) -> Any:
    return forecast(shop.interval(period), "taylor", 1), None


def _whole_step(shop: Workshop, period: int) -> Any:
    return shop.whole_step(shop.interval(period, "output")), None


def _lowrank(shop: Workshop, period: int, method: str) -> Any:
    return lowrank(shop.interval(period)), shop.factors(method, 16, period)


def main() -> None:
    """Measure and write `quality-flux-emoji-<steps>.json` and `.png`."""
    parser = host_options(__doc__)
    parser.set_defaults(scheduler="flow-euler", steps=28, guidance=2.0)
    parser.add_argument("--only", nargs="*", default=list(POLICIES), help="names of policies of the quality benchmark")
    arguments = parser.parse_args()
    host = EmojiHost.of(arguments, seeds=NOISE_SEEDS[MEASURING][:2])
    stats = calibrate(
        host.model, host.scheduler, schedule=host.schedule(host.steps), channels=False, **host.unguided(SAMPLES, SEED)
    )
    with Progress() as progress:
        rows = measure(host, stats, progress, {name: KNOBS[name] for name in arguments.only})
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
