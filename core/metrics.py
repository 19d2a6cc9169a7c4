"""Paired image metrics: the same noise sampled twice, compared sample by sample; and what an error is worth at its cost."""

import math
from collections.abc import Sequence

import torch


def relative_errors(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """||value - reference|| / ||reference|| of each sample, [B] float64; both [B, ...]. Of zeros the norm counts as 1e-30."""
    value, reference = value.double().flatten(1), reference.double().flatten(1)
    errors: torch.Tensor = (value - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-30)
    return errors


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The same of two tensors of any one shape as a whole."""
    return float(relative_errors(value.reshape(1, -1), reference.reshape(1, -1)))


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over samples of ||value - reference|| / ||reference||; both [B, ...], computed in float64."""
    return float(relative_errors(value, reference).mean())


def psnr(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images [B, C, H, W] in -1..1, from the mean squared error over all of them."""
    value, reference = ((t.double() / 2 + 0.5).clamp(0, 1) for t in (value, reference))
    error = float((value - reference).square().mean())
    return -10 * math.log10(error) if error else math.inf


def error_at_equal_macs(points: Sequence[tuple[float, float]], macs: float) -> float | None:
    """The error that measured ways of sampling, such as fewer steps, have at these MACs.

    Log-linear between neighbours, because errors span decades: half way between 0.001 and 0.1 is 0.01, where a straight line
    would say 0.05 and make whatever is compared with it look good. Towards a point without error, which has no logarithm (full
    compute), it is a straight line.

    Args:
        points: (MACs, error) of each, in any order and any unit of MACs.
        macs: Where, in the same unit.

    Returns:
        None below the fewest MACs measured; above the most, the error there.
    """
    known = sorted(points)
    # What has passed through a quotient still counts as the same MACs.
    if macs < known[0][0] * (1 - 1e-9):
        return None
    for (low, first), (high, second) in zip(known, known[1:], strict=False):
        if macs <= high:
            share = max(0.0, (macs - low) / (high - low)) if high > low else 0.0
            if first > 0 and second > 0:
                return float(first ** (1 - share) * second**share)
            return (1 - share) * first + share * second
    return known[-1][1]


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
