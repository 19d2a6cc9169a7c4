"""The models that ship with stepgraph, each with what its samples are made of and judged by."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stepgraph.assets.emoji_captions import BACKGROUNDS, caption
from stepgraph.assets.glyphs import CLASSES, NULL_CLASS, load_classifier
from stepgraph.assets.image_classifier import ImageClassifier, top_accuracy
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.models.flux import sigmas

EMOJI = "flux-emoji"
SIZE = 32


@dataclass(frozen=True)
class Shipped:
    """A model, and one sample per image asked for.

    Attributes:
        name: As the command line knows it.
        model: On its device.
        scheduler: What it was trained for.
        steps: That it is usually sampled in.
        noise: [B, ...], in the model's dtype.
        conditioning: For `stepgraph.sample`, the unconditional inputs among it.
        labels: What the judge should see in each image, [B]; -1 where that is not known.
        judge: The network that looks at the images.
        guesses: Among how many of its best ones the right one counts.
        pictures: Latents [B, ...] as images [B, 3, H, W] in -1..1.
    """

    name: str
    model: nn.Module
    scheduler: Any
    steps: int
    noise: torch.Tensor
    conditioning: Mapping[str, torch.Tensor]
    labels: torch.Tensor
    judge: ImageClassifier
    guesses: int
    pictures: Callable[[torch.Tensor], torch.Tensor]

    def schedule(self, steps: int) -> dict[str, Any]:
        """What its pipeline sets the scheduler with."""
        return schedule_of(self.name, {}, steps)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The conditional inputs."""
        return {name: value for name, value in self.conditioning.items() if not name.startswith("negative_")}

    def accuracy(self, latents: torch.Tensor) -> float:
        """Share of the images that are seen as what was asked for."""
        return top_accuracy(self.judge, self.pictures(latents), self.labels, self.guesses)


def glyphs(images: int, device: str, dtype: torch.dtype, seed: int) -> Shipped:
    """glyph-dit, its classes in turn."""
    labels = torch.arange(images, device=device) % len(CLASSES)
    conditioning = {"class_labels": labels, "negative_class_labels": torch.full_like(labels, NULL_CLASS)}
    model, scheduler = load_model("glyph-dit", device, dtype), load_scheduler("glyph-dit")
    noise = _noise((3, 24, 24), images, device, dtype, seed)
    return Shipped(
        "glyph-dit", model, scheduler, 50, noise, conditioning, labels, load_classifier(), 1, lambda latents: latents
    )


def emoji(images: int, device: str, dtype: torch.dtype, seed: int, prompts: Sequence[str] = ()) -> Shipped:
    """flux-emoji: these prompts in turn, or icons evenly over all that it knows, on its backgrounds in turn.

    Raises:
        ArgumentError: A prompt has a word that the model does not know; the message names the nearest ones.
    """
    from stepgraph.assets.flux_emoji import PIXELS, load_flux_emoji, load_retrieval, unpacked

    pipe, encoder = load_flux_emoji(device=device, dtype=dtype)
    judge, names = load_retrieval()
    if prompts:
        labels = torch.full((images,), -1)
        wanted = [prompts[image % len(prompts)] for image in range(images)]
    else:
        labels, wanted = _icons(names, images)
    conditioning = encoder.conditioning(wanted, SIZE)
    noise = _noise(((SIZE // PIXELS) ** 2, pipe.transformer.config.in_channels), images, device, dtype, seed)
    return Shipped(EMOJI, pipe.transformer, pipe.scheduler, 28, noise, conditioning, labels, judge, 5, unpacked)


def _icons(names: Sequence[str], count: int) -> tuple[torch.Tensor, list[str]]:
    """Numbers and captions of icons, evenly over all names, on the backgrounds in turn."""
    numbers = torch.arange(count) * len(names) // count
    backgrounds = itertools.cycle(BACKGROUNDS)
    return numbers, [caption(names[number], next(backgrounds)) for number in numbers]


def schedule_of(name: str, wish: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What a scheduler is set with, for `stepgraph.sample`: as wished, and where that names neither sigmas nor timesteps, the
    sigmas that a shipped model's pipeline sets.
    """
    own = {"sigmas": list(sigmas(steps))} if name == EMOJI and not wish.keys() & {"sigmas", "timesteps"} else {}
    return {**own, **wish}


def conditions(name: str, model: nn.Module, samples: int, guided: bool) -> dict[str, Any] | None:
    """What a model is calibrated on, for `stepgraph.calibrate`; None where its family says that itself."""
    if name != EMOJI:
        return None
    from stepgraph.assets.flux_emoji import load_retrieval, load_words

    weight = next(model.parameters())
    words, (_, names) = load_words(device=weight.device, dtype=weight.dtype), load_retrieval()
    return {**words.conditioning(_icons(names, samples)[1], SIZE, guided)}


SHIPPED: Mapping[str, Callable[[int, str, torch.dtype, int], Shipped]] = {"glyph-dit": glyphs, EMOJI: emoji}


def _noise(shape: Sequence[int], images: int, device: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
