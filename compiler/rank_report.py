"""How good factors are on increments that they were not made from, rank by rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stepgraph.compiler.covariances import Covariances
from stepgraph.compiler.describe import marked_graph
from stepgraph.compiler.factorize import Source, check_arguments, check_rank, decompositions, find_paths
from stepgraph.compiler.factors import Factors, refuse_model
from stepgraph.plan import PlanError


@dataclass(frozen=True)
class RankReport:
    """Errors of one method's factors on measured increments.

    Attributes:
        method: Of the factors.
        errors: Rank -> module path -> relative weighted error.
    """

    method: str
    errors: Mapping[int, Mapping[str, float]]

    @property
    def mean(self) -> dict[int, float]:
        """Root mean square over the maps, per rank."""
        return {rank: mean_error(own) for rank, own in self.errors.items()}

    @property
    def worse(self) -> dict[str, list[tuple[int, int]]]:
        """Module path -> pairs (smaller, larger) of ranks of which the larger has the larger error; maps without are left out.

        The error of "svd", "ca" and "cd" need not fall with the rank, because it is not what they minimise.
        """
        paths = next(iter(self.errors.values()), {})
        found = {path: worse_ranks([(rank, own[path]) for rank, own in self.errors.items()]) for path in paths}
        return {path: pairs for path, pairs in found.items() if pairs}


def rank_report(
    model: nn.Module,
    source: Source,
    held_out: Covariances,
    ranks: Sequence[int],
    *,
    method: str = "cov",
    scale: str = "both",
    kinds: Sequence[str] | None = None,
    shrinkage: float | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> RankReport:
    """Factorise every map once and measure the error of each rank on increments of other runs.

    Args:
        model: As for `factorize`, which also says what the other arguments are.
        source: What the factors are made from.
        held_out: Covariances of runs with another seed; with the method "whole" measured with whole=True.
        ranks: To try.
        method: Of the factors.
        scale: Likewise.
        kinds: Likewise.
        shrinkage: Likewise.
        inputs: Likewise.

    Raises:
        PlanError: As `factorize`; the held-out runs are of another model, or are the very runs of the source.
    """
    if not ranks:
        raise PlanError("no ranks to try; give at least one")
    check_arguments(model, source, method, max(ranks), None, scale, shrinkage)
    refuse_model("the covariances are", _made_for(held_out), model)
    if isinstance(source, Covariances) and source.header.seed == held_out.header.seed:
        raise PlanError(f"both sets of covariances are of seed {source.header.seed}; hold out runs of another one")
    marked = marked_graph(model, inputs)
    paths = list(find_paths(model, marked, method, kinds))
    for rank in ranks:
        check_rank(model, marked, rank, paths, method, source)
    errors: dict[int, dict[str, float]] = {rank: {} for rank in sorted(set(ranks))}
    for path, terms in decompositions(model, source, paths, method, scale, shrinkage):
        for rank, own in errors.items():
            own[path] = error_on(model, path, *terms.cut(rank), method, held_out)
    return RankReport(method, errors)


def measured_errors(model: nn.Module, factors: Factors, covariances: Covariances) -> dict[str, float]:
    """Relative weighted error of every map on measured increments: sqrt(E||(W - A B) dx||^2 / E||W dx||^2).

    Raises:
        PlanError: The factors or covariances are of another model, or a map was not measured.
    """
    factors.refuse_other(model)
    refuse_model("the covariances are", _made_for(covariances), model)
    return {path: error_on(model, path, a, b, factors.method, covariances) for path, (a, b) in factors.maps.items()}


def error_on(model: nn.Module, path: str, a: Tensor, b: Tensor, method: str, covariances: Covariances) -> float:
    """Relative weighted error of A [C_out, r] and B [r, C_in] of one map, or of one site's whole module."""
    covariance = covariances.matrix(path)
    product = a.double().cpu() @ b.double().cpu()
    if method == "whole":
        cross, square = covariances.cross(path)
        lost = square - 2 * float((product * cross).sum()) + _square(product, covariance)
        return math.sqrt(max(lost, 0.0) / square)
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    w = weight.detach().double().cpu()
    return math.sqrt(_square(w - product, covariance) / max(_square(w, covariance), 1e-300))


def mean_error(errors: Mapping[str, float]) -> float:
    """Root mean square of some maps' relative errors."""
    return math.sqrt(sum(error**2 for error in errors.values()) / len(errors)) if errors else math.nan


def worse_ranks(errors: Sequence[tuple[int, float]], tolerance: float = 1e-6) -> list[tuple[int, int]]:
    """Pairs (smaller, larger) of ranks where the larger one has the larger error: (rank, error) -> where r does not help.

    For every rank that is worse than some smaller one, the best smaller one is named.
    """
    found = []
    ordered = sorted(errors)
    for at, (rank, error) in enumerate(ordered):
        better = [(e, r) for r, e in ordered[:at] if r < rank and e < error * (1 - tolerance)]
        if better:
            found.append((min(better)[1], rank))
    return found


def _square(matrix: Tensor, covariance: Tensor) -> float:
    """E||matrix dx||^2."""
    return max(float(((matrix @ covariance) * matrix).sum()), 0.0)


def _made_for(covariances: Covariances) -> tuple[str, str, str]:
    header = covariances.header
    return header.model, header.fingerprint, header.dtype
