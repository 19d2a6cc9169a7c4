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


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fréchet distance of two sets of features [N, F] as Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), in float64.

    (Dowson and Landau, 1982; as FID takes it.)
    """
    means = [features.double().mean(0) for features in (first, second)]
    one, two = (torch.cov(features.double().T) for features in (first, second))
    # tr (C1 C2)^1/2 = tr (C1^1/2 C2 C1^1/2)^1/2, whose argument is symmetric.
    root = _square_root(one)
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + one.trace() + two.trace() - 2 * cross)


def _square_root(matrix: torch.Tensor) -> torch.Tensor:
    """Of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: torch.Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
