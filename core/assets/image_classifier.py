"""Small image classifiers whose features the quality metrics use, and what is measured with them."""

from collections.abc import Sequence

import torch
from torch import nn


class ImageClassifier(nn.Module):
    """A convolutional network of a few stages, each but the first at half the resolution of the one before."""

    def __init__(self, classes: int, widths: Sequence[int] = (24, 48, 64, 64), features: int = 32) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2 if i else 1, 1), nn.GroupNorm(4, b), nn.GELU())
                for i, (a, b) in enumerate(zip((3, *widths), widths, strict=False))
            )
        )
        self.embed = nn.Linear(widths[-1], features)
        self.head = nn.Linear(features, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in -1..1 to features [B, F]."""
        return torch.tanh(self.embed(self.stages(images).mean((2, 3))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in -1..1 to class logits [B, classes]."""
        logits: torch.Tensor = self.head(self.features(images))
        return logits

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What each stage makes of images [B, 3, H, W] in -1..1, [B, C, H', W'] each."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps


@torch.no_grad()
def features_of(classifier: ImageClassifier, images: torch.Tensor) -> torch.Tensor:
    """Features [B, F] in float64 of images [B, 3, H, W], clamped to -1..1."""
    return torch.cat([classifier.features(part.float().cpu().clamp(-1, 1)) for part in images.split(500)]).double()


@torch.no_grad()
def top_accuracy(classifier: ImageClassifier, images: torch.Tensor, labels: torch.Tensor, count: int = 1) -> float:
    """Share of the images [B, 3, H, W] in -1..1 whose label [B] is among the classifier's `count` best guesses."""
    guesses = [classifier(part.float().cpu().clamp(-1, 1)).topk(count).indices for part in images.split(500)]
    return float((torch.cat(guesses) == labels.cpu()[:, None]).any(1).double().mean())


@torch.no_grad()
def perceptual_distance(classifier: ImageClassifier, images: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over pairs of images [B, 3, H, W] in -1..1 of how far apart the stages' maps are.

    As LPIPS (Zhang et al., 2018) without its learned weights: channels of unit length at every place, squared differences
    summed over channels, averaged over places, summed over stages.
    """
    total = 0.0
    for pair in zip(images.split(100), reference.split(100), strict=True):
        ours, theirs = (classifier.maps(part.float().cpu().clamp(-1, 1)) for part in pair)
        for one, two in zip(ours, theirs, strict=True):
            one, two = (nn.functional.normalize(maps, dim=1, eps=1e-8) for maps in (one, two))
            total += float((one - two).square().sum(1).mean((1, 2)).sum())
    return total / len(images)
