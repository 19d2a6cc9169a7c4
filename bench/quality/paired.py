"""Paired quality: the same noise under full compute and under whatever is measured; on glyph-dit, or on what a host is of."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from rich.progress import Progress
from torch import nn

from stepgraph.assets.glyphs import CLASSES, NULL_CLASS, load_classifier
from stepgraph.assets.image_classifier import ImageClassifier, features_of, perceptual_distance, top_accuracy
from stepgraph.bench.glyphs.glyph_data import render
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.routers.router import Router
from stepgraph.compiler.routers.router_settings import settings_of
from stepgraph.compiler.routers.train_router import train_router
from stepgraph.config import CompileConfig
from stepgraph.metrics import frechet_distance, psnr, relative_errors
from stepgraph.plan import CachePlan
from stepgraph.plan.factors import Factors
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.sampling.sample import sample

# Images sampled together: more make the activations fall out of a CPU's cache.
BATCH = 64

H = TypeVar("H", bound="Host")


def host_options(description: str | None, samples: int = 128, out: str = "out/quality") -> argparse.ArgumentParser:
    """A command line with the options that say on what is measured, and where the results go.

    Args:
        description: The benchmark's docstring, for its help.
        samples: Images, unless asked for otherwise.
        out: Folder of the results, unless asked for otherwise.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=samples, help="images, in equal groups of one seed each")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


@dataclass
class Host:
    """A sampler on a model, its full runs from fixed noise, and how far others are from them; the model is glyph-dit.

    Attributes:
        scheduler_name: As the command line knows it.
        steps: Inference steps of the full runs.
        guidance: Scale of the classifier-free guidance.
        seeds: One group of `BATCH` images, or of several batches, starts from each.
        per_seed: Images per seed.
        device: Where it runs.
        name: Of the model.
        shape: Of a sample's latents.
        guesses: Among how many of the classifier's best ones the right one counts.
        noise: Of every image, [count, ...].
        labels: What the classifier should see in every image, [count].
        conditioning: Of every image, for `stepgraph.sample`.
    """

    scheduler_name: str
    steps: int
    guidance: float
    seeds: Sequence[int]
    per_seed: int = BATCH
    device: str = "cpu"
    name: ClassVar[str] = "glyph-dit"
    shape: ClassVar[tuple[int, ...]] = (3, 24, 24)
    guesses: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.model, self.scheduler, self.classifier = self.loaded(), self.sampler(), self.judge()
        drawn = [torch.randn(self.per_seed, *self.shape, generator=torch.Generator().manual_seed(seed)) for seed in self.seeds]
        self.noise = torch.cat(drawn).to(self.device)
        self.labels, self.conditioning = self.wanted()
        self.reference = self.images(self.model)
        self.features = features_of(self.classifier, self.pictures(self.reference))

    @classmethod
    def of(cls: type[H], arguments: argparse.Namespace, seeds: Sequence[int] = range(4)) -> H:
        """The host that a command line asks for (`host_options`), its images in equal groups of one seed each."""
        per_seed = arguments.samples // len(seeds)
        return cls(arguments.scheduler, arguments.steps, arguments.guidance, seeds, per_seed, arguments.device)

    def loaded(self) -> nn.Module:
        """The model that is sampled."""
        return load_model(self.name, self.device)

    def sampler(self) -> Any:
        """The scheduler."""
        return load_scheduler(self.name, self.scheduler_name)

    def judge(self) -> ImageClassifier:
        """The network whose features and guesses are compared."""
        return load_classifier()

    def wanted(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """`labels` and `conditioning`: the classes in turn, from each seed on anew."""
        labels = (torch.arange(self.per_seed) % len(CLASSES)).repeat(len(self.seeds))
        classes = labels.to(self.device)
        return labels, {"class_labels": classes, "negative_class_labels": torch.full_like(classes, NULL_CLASS)}

    def schedule(self, steps: int) -> dict[str, Any]:
        """What the scheduler is set with, beside the number of steps."""
        return {}

    def fixed(self) -> dict[str, Any]:
        """Conditioning that has no batch dimension."""
        return {}

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, ...] as images [B, 3, H, W] in -1..1: glyph-dit's are."""
        return latents

    def fits(self, samples: int, seed: int) -> dict[str, Any]:
        """The runs that something is fitted on, as calibration and fits take them."""
        return {"samples": samples, "seed": seed, "guidance_scale": self.guidance}

    def watched(self, samples: int, seed: int) -> dict[str, Any]:
        """The runs that policies are calibrated on: conditional ones, without guidance."""
        return {"samples": samples, "seed": seed}

    def trained_on(self, samples: int) -> dict[str, Any]:
        """The runs that routers are trained on, for `stepgraph.train_router`."""
        return {}

    def example(self, rows: int) -> dict[str, Any]:
        """Inputs of the model of this many rows."""
        return example_inputs(self.model, rows)

    @property
    def count(self) -> int:
        """Images in all."""
        return len(self.seeds) * self.per_seed

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of the runs."""
        return {
            "model": self.name, "scheduler": type(self.scheduler).__name__, "steps": self.steps, "samples": self.count,
            "guidance_scale": self.guidance,
        }  # fmt: skip

    def images(
        self, runner: Any, steps: int | None = None, on_batch: Callable[[], None] = lambda: None, scheduler: Any = None
    ) -> torch.Tensor:
        """What a model or executable makes of the host's noise, [count, ...], on the CPU; by this scheduler, or the host's."""
        parts = []
        for group in torch.arange(self.count).split(self.per_seed):
            for rows in group.split(BATCH):
                chosen: Mapping[str, Any] = {name: value[rows.to(self.device)] for name, value in self.conditioning.items()}
                own = self.schedule(steps or self.steps) if scheduler is None else {}
                final = sample(
                    runner, scheduler or self.scheduler, self.noise[rows.to(self.device)], self.guidance,
                    steps=steps or self.steps, schedule=own, **chosen, **self.fixed(),
                )  # fmt: skip
                parts.append(final.cpu())
                on_batch()
        return torch.cat(parts)

    def compiled(self, plan: CachePlan, factors: Factors | None = None) -> Executable:
        """A plan's executable for the host's batch."""
        rows = 2 * min(BATCH, self.per_seed)
        return compile_plan(self.model, plan, self.example(rows), CompileConfig("eager"), factors)

    def trained_router(self, progress: Progress, what: str, checkpoint: Path | None = None, **changes: Any) -> Router:
        """Routers of Learning-to-Cache: the preset "quick" with some settings changed; `what` stands beside the bar."""
        settings = settings_of("quick", changes)
        bar = progress.add_task(what, total=settings.iterations)
        return train_router(
            self.model, self.scheduler, steps=self.steps, settings=settings, checkpoint=checkpoint,
            on_step=lambda done, _: progress.update(bar, completed=done), **self.trained_on(settings.pool),
        )  # fmt: skip

    def errors(self, images: torch.Tensor) -> torch.Tensor:
        """Relative L2 distance of each image from that of the full run, [count] float64."""
        return relative_errors(images, self.reference)

    def compare(self, images: torch.Tensor) -> dict[str, Any]:
        """Errors of images against the full runs from the same noise.

        `standard_error` is that of the mean over images; `seed_spread` the standard deviation of the seeds' means; `p95` and
        `largest` are of the images' own errors.
        """
        errors = self.errors(images)
        by_seed = errors.view(len(self.seeds), self.per_seed).mean(1)
        ratio, pictures = psnr(images, self.reference), self.pictures(images)
        return {
            "relative_l2": float(errors.mean()),
            "standard_error": float(errors.std() / self.count**0.5),
            "seed_spread": float(by_seed.std()) if len(by_seed) > 1 else None,
            "p95": float(errors.quantile(0.95)),
            "largest": float(errors.max()),
            # JSON knows no infinity.
            "psnr": ratio if math.isfinite(ratio) else None,
            "feature_distance": float((features_of(self.classifier, pictures) - self.features).norm(dim=1).mean()),
            "perceptual_distance": perceptual_distance(self.classifier, pictures, self.pictures(self.reference)),
            "accuracy": top_accuracy(self.classifier, pictures, self.labels, self.guesses),
        }

    def fewer_steps(self, count: int) -> dict[str, Any]:
        """The row of full compute in fewer steps."""
        compared = self.compare(self.images(self.model, count))
        return {"name": "fewer steps", "fewer_macs": self.steps / count, "knob": count, **compared}

    def frechet(self, images: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
        """Fréchet distances of the classifier's features: to real images' features, and to the full runs'."""
        features = features_of(self.classifier, self.pictures(images))
        return {"frechet_real": frechet_distance(features, real), "frechet_full": frechet_distance(features, self.features)}

    def real_features(self, count: int = 10_000) -> torch.Tensor:
        """Features of freshly rendered glyphs, [count, 32]."""
        real, _ = render(count, 24, seed=3)
        return features_of(self.classifier, real.float() / 127.5 - 1)
