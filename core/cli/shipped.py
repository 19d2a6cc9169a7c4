"""The models that ship with stepgraph, each with what its samples are made of and judged by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stepgraph.assets.glyphs import CLASSES, NULL_CLASS, load_classifier
from stepgraph.assets.image_classifier import ImageClassifier, top_accuracy
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.models.flux import sigmas

# Of flux-emoji's captions.
BACKGROUNDS = ("mint", "sky", "rose", "lemon", "lilac", "peach", "snow", "slate")
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
        return pipeline_schedule(self.name, steps)

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
    from stepgraph.assets.flux_emoji import load_flux_emoji, load_retrieval, unpacked

    pipe, encoder = load_flux_emoji(device=device, dtype=dtype)
    judge, names = load_retrieval()
    if prompts:
        labels = torch.full((images,), -1)
        wanted = [prompts[image % len(prompts)] for image in range(images)]
    else:
        labels = torch.arange(images) * len(names) // images
        backgrounds = [BACKGROUNDS[image % len(BACKGROUNDS)] for image in range(images)]
        icons = [names[label].replace("-", " ") for label in labels]
        wanted = [f"{icon} on {background}" for icon, background in zip(icons, backgrounds, strict=True)]
    conditioning = prompted(encoder, wanted)
    noise = _noise(((SIZE // 4) ** 2, 48), images, device, dtype, seed)
    return Shipped("flux-emoji", pipe.transformer, pipe.scheduler, 28, noise, conditioning, labels, judge, 5, unpacked)


def prompted(encoder: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """flux-emoji's conditioning of prompts [B], with the unconditional one."""
    from stepgraph.assets.flux_emoji import positions

    conditioning: dict[str, torch.Tensor] = {}
    for prefix, texts in (("", prompts), ("negative_", [""] * len(prompts))):
        encoded = encoder.encode(texts)
        conditioning[f"{prefix}encoder_hidden_states"] = encoded["prompt_embeds"]
        conditioning[f"{prefix}pooled_projections"] = encoded["pooled_prompt_embeds"]
    ids = encoded["text_ids"]
    return conditioning | {"img_ids": positions(SIZE, ids.device, ids.dtype), "txt_ids": ids}


def pipeline_schedule(name: str, steps: int) -> dict[str, Any]:
    """What a shipped model's pipeline sets its scheduler with, for `stepgraph.sample`; nothing for other models."""
    return {"sigmas": list(sigmas(steps))} if name == "flux-emoji" else {}


def conditions(name: str, samples: int, guided: bool, device: str, dtype: torch.dtype) -> dict[str, Any] | None:
    """What a model is calibrated on, for `stepgraph.calibrate`; None where its family says that itself."""
    if name != "flux-emoji":
        return None
    drawn = emoji(samples, device, dtype, 0)
    return {**(drawn.conditioning if guided else drawn.inputs)}


SHIPPED: Mapping[str, Callable[[int, str, torch.dtype, int], Shipped]] = {"glyph-dit": glyphs, "flux-emoji": emoji}


def _noise(shape: Sequence[int], images: int, device: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
