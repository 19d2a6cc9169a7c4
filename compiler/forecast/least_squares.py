"""Least squares over a few tensors: which combination of them comes nearest to another one."""

from collections.abc import Sequence

import torch


def least_squares(
    values: Sequence[torch.Tensor | None], target: torch.Tensor, ridge: float, per_channel: bool = False
) -> tuple[torch.Tensor, float]:
    """The coefficients that minimise |sum_i c_i values_i - target|^2 over all elements.

    The normal equations are in float64, with every term scaled to length 1 before `ridge` is added to their diagonal. A term
    that is zero everywhere gets the coefficient 0.

    Args:
        values: k tensors of the target's shape [..., C]; None stands for the constant 1.
        target: [..., C].
        ridge: A small number above 0.
        per_channel: Whether every channel of the last dimension has its own coefficients.

    Returns:
        [k] float64 (or [k, C]) on the CPU, and |residual| / |target|; 0 where the target is zero.
    """
    channels = target.shape[-1] if per_channel else 1
    count, rows = target.numel() // channels, [v.reshape(-1, channels) for v in (*_present(values), target)]
    constant = len(rows) <= len(values)
    # [channels, k + 1, k + 1]: all products of the terms and, last, the target.
    products = torch.stack([torch.stack([(a.double() * b.double()).sum(0) for b in rows]) for a in rows]).permute(2, 0, 1).cpu()
    if constant:
        sums = torch.stack([row.double().sum(0) for row in rows]).T.cpu()
        products = _with_constant(products, sums, count)
    k = products.shape[-1] - 1
    gram, wanted = products[:, :k, :k], products[:, :k, k]
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = torch.where(lengths > 0, 1 / lengths.clamp_min(1e-300), 0.0)
    scaled = gram * scale[:, :, None] * scale[:, None, :] + ridge * torch.eye(k, dtype=torch.float64)
    solution = torch.linalg.solve(scaled, wanted * scale) * scale
    left = products[:, k, k] - 2 * (solution * wanted).sum(-1) + torch.einsum("ci,cij,cj->c", solution, gram, solution)
    total = float(products[:, k, k].sum())
    residual = (float(left.sum().clamp_min(0)) / total) ** 0.5 if total else 0.0
    return (solution.T.contiguous() if per_channel else solution[0]), residual


def _present(values: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [value for value in values if value is not None]


def _with_constant(products: torch.Tensor, sums: torch.Tensor, count: int) -> torch.Tensor:
    """The products with those of the constant 1 put between the terms' and the target's."""
    size = products.shape[-1]
    whole = products.new_zeros(len(products), size + 1, size + 1)
    places = [*range(size - 1), size]
    whole[:, [[i] for i in places], places] = products
    whole[:, size - 1, places] = whole[:, places, size - 1] = sums
    whole[:, size - 1, size - 1] = count
    return whole
