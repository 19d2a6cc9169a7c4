"""Errors of factors on measured increments."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from stepgraph.compiler.lowrank.covariances import Covariances
from stepgraph.compiler.lowrank.decompose import weight_of
from stepgraph.errors import MismatchError


def error_on(model: nn.Module, path: str, a: Tensor, b: Tensor, method: str, covariances: Covariances) -> float:
    """Relative weighted error of A [C_out, r] and B [r, C_in] of one map, or of one site's whole module.

    Raises:
        PlanError: The map was not measured, or its covariance is of another size.
    """
    covariance = covariances.matrix(path)
    if len(covariance) != b.shape[1]:
        size = b.shape[1]
        raise MismatchError(
            f"{path}: the covariance is {list(covariance.shape)}; expected [{size}, {size}], as its factors read"
        )
    product = a.double().cpu() @ b.double().cpu()
    if method == "whole":
        cross, square = covariances.cross(path)
        lost = square - 2 * float((product * cross).sum()) + _square(product, covariance)
        return math.sqrt(max(lost, 0.0) / square)
    weight = weight_of(model, path)
    w = weight.detach().double().cpu()
    return math.sqrt(_square(w - product, covariance) / max(_square(w, covariance), 1e-300))


def mean_error(errors: Mapping[str, float]) -> float:
    """Root mean square of some maps' relative errors."""
    return math.sqrt(sum(error**2 for error in errors.values()) / len(errors)) if errors else math.nan


def worse_ranks(errors: Sequence[tuple[int, float]], tolerance: float = 1e-6) -> list[tuple[int, int]]:
    """Pairs (smaller, larger) of ranks where the larger one has the larger error: (rank, error) -> where r does not help.

    For every rank that is worse than some smaller one, the best smaller one is named.
    """
    worse = []
    ordered = sorted(errors)
    for at, (rank, error) in enumerate(ordered):
        better = [(e, r) for r, e in ordered[:at] if r < rank and e < error * (1 - tolerance)]
        if better:
            worse.append((min(better)[1], rank))
    return worse


def _square(matrix: Tensor, covariance: Tensor) -> float:
    """E||matrix dx||^2."""
    return max(float(((matrix @ covariance) * matrix).sum()), 0.0)


def made_for(covariances: Covariances) -> tuple[str, str, str]:
    """Class, fingerprint and dtype of the model that was measured."""
    header = covariances.header
    return header.model, header.fingerprint, header.dtype
