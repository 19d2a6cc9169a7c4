"""Paired image metrics: the same noise sampled twice, compared sample by sample."""

import math

import torch


def relative_errors(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """||value - reference|| / ||reference|| of each sample, [B] float64; both [B, ...]."""
    value, reference = value.double().flatten(1), reference.double().flatten(1)
    errors: torch.Tensor = (value - reference).norm(dim=1) / reference.norm(dim=1)
    return errors


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over samples of ||value - reference|| / ||reference||; both [B, ...], computed in float64."""
    return float(relative_errors(value, reference).mean())


def psnr(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images [B, C, H, W] in -1..1, from the mean squared error over all of them."""
    value, reference = ((t.double() / 2 + 0.5).clamp(0, 1) for t in (value, reference))
    error = float((value - reference).square().mean())
    return -10 * math.log10(error) if error else math.inf
