"""How good factors are on increments that they were not made from, rank by rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stepgraph.compiler.lowrank.covariances import Covariances
from stepgraph.compiler.lowrank.factorize import Source, check_arguments, check_rank, decompositions, find_paths
from stepgraph.compiler.lowrank.map_errors import error_on, made_for, mean_error, worse_ranks
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.errors import ArgumentError
from stepgraph.plan.factors import refuse_model


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
        return {rank: mean_error(errors) for rank, errors in self.errors.items()}

    @property
    def worse(self) -> dict[str, list[tuple[int, int]]]:
        """Module path -> pairs (smaller, larger) of ranks of which the larger has the larger error; maps without are left out.

        The terms of "ca" and "cd" with a scale on the output are not orthogonal to one another, so that another one can add
        to the error; a whole map can fit what it was made from and nothing else.
        """
        paths = next(iter(self.errors.values()), {})
        by_path = {path: worse_ranks([(rank, errors[path]) for rank, errors in self.errors.items()]) for path in paths}
        return {path: pairs for path, pairs in by_path.items() if pairs}


def rank_report(
    model: nn.Module,
    source: Source,
    held_out: Covariances,
    ranks: Sequence[int],
    *,
    method: str = "cov",
    scale: str | None = None,
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
    return report_traced(
        TracedModel(model), source, held_out, ranks, method=method, scale=scale, kinds=kinds, shrinkage=shrinkage, inputs=inputs
    )


def report_traced(
    traced: TracedModel, source: Source, held_out: Covariances, ranks: Sequence[int], *, method: str, scale: str | None,
    kinds: Sequence[str] | None, shrinkage: float | None, inputs: Mapping[str, Tensor] | None = None,
) -> RankReport:  # fmt: skip
    """`rank_report`, on the graphs of a traced model, so that it is traced for no signature twice."""
    model = traced.model
    if not ranks:
        raise ArgumentError("no ranks to try; give at least one")
    check_arguments(model, source, method, max(ranks), None, scale, shrinkage)
    refuse_model("the covariances are", made_for(held_out), model)
    if isinstance(source, Covariances) and source.header.seed == held_out.header.seed:
        raise ArgumentError(f"both sets of covariances are of seed {source.header.seed}; hold out runs of another one")
    marked = traced.marked(inputs)
    paths = list(find_paths(model, marked, method, kinds, source))
    for rank in ranks:
        check_rank(model, marked, rank, paths, method, source)
    errors: dict[int, dict[str, float]] = {rank: {} for rank in sorted(set(ranks))}
    for path, terms in decompositions(model, source, paths, method, scale, shrinkage):
        for rank, by_map in errors.items():
            by_map[path] = error_on(model, path, *terms.cut(rank), method, held_out)
    return RankReport(method, errors)
