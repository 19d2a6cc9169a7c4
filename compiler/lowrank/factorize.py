"""Low-rank factors of a model's linear maps, by any of five methods."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from stepgraph.checked import checked
from stepgraph.checks import check_whole
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.lowrank.allocate_ranks import RankedMap, allocate_ranks
from stepgraph.compiler.lowrank.covariances import Covariances
from stepgraph.compiler.lowrank.decompose import (
    Decomposition,
    channel_scales,
    check_choice,
    plain_svd,
    reduced_rank_regression,
    scaled_svd,
    shrunk,
    weight_of,
    weighted_svd,
)
from stepgraph.compiler.lowrank.increments import find_maps, find_single_map_sites
from stepgraph.compiler.lowrank.map_errors import error_on
from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.errors import ArgumentError, PlanError
from stepgraph.fingerprint import dtype_name, fingerprint, has_data, model_dtype
from stepgraph.plan.factors import METHODS, Factors, as_json, refuse_model
from stepgraph.runtime.program.stated_facts import refuse_other_facts
from stepgraph.wrapped_models import unwrapped

Source = CalibrationStats | Covariances | None
# What each method is made from.
SOURCES: Mapping[str, type[CalibrationStats] | type[Covariances] | None] = {
    "svd": None,
    "ca": CalibrationStats,
    "cd": CalibrationStats,
    "cov": Covariances,
    "whole": Covariances,
}
WANTS: Mapping[type | None, str] = {
    None: "no source",
    CalibrationStats: "stepgraph.calibrate(..., channels=True)",
    Covariances: "stepgraph.measure_covariances(...)",
}


@checked
def factorize(
    model: nn.Module,
    source: Source = None,
    *,
    method: str = "cov",
    rank: int | None = None,
    budget: float | None = None,
    scale: str | None = None,
    kinds: Sequence[str] | None = None,
    shrinkage: float | None = None,
    chunk: int = 8,
    inputs: Mapping[str, Any] | None = None,
) -> Factors:
    """Factors A [C_out, r] and B [r, C_in] of every linear map inside module sites.

    Args:
        model: With its weights; they are not changed.
        source: What was measured: CalibrationStats for "ca" and "cd", Covariances for "cov" and "whole"; nothing for "svd".
        method: "svd": W's own singular values. "ca", "cd": W scaled by how large its channels are, or how much they change
            (CA-SVD and CD-SVD of arXiv 2505.05829). "cov": what minimises E||(W - A B) dx||^2 over the measured increments.
            "whole": one map per module site, what minimises E||dy - A B dx||^2 from the site's input to its output.
        rank: r of every map; or
        budget: share of the maps' own multiply-accumulates that all A B x together may cost (B x once more at computed steps is
            not counted); the ranks are then allocated by the method's own weights.
        scale: Side of W that "ca" and "cd" scale: "in", "out" or "both"; "both" unless given.
        kinds: Of the sites; all module sites unless given, or those that a plan corrects where its own runs were measured.
        shrinkage: How far "cov" and "whole" draw the covariance towards a multiple of the identity, 0..1; estimated unless
            given.
        chunk: In what steps a budget gives out ranks.
        inputs: The forward's arguments, where the model's usual shapes are not meant.

    Raises:
        PlanError: Unknown method, an option that the method does not take, a source of another kind or model, a rank that a map
            cannot have, a degenerate covariance, or kinds without a linear map.
    """
    return factors_traced(
        TracedModel(unwrapped(model)), source, method=method, rank=rank, budget=budget, scale=scale, kinds=kinds,
        shrinkage=shrinkage, chunk=chunk, inputs=inputs,
    )  # fmt: skip


def factors_traced(
    traced: TracedModel, source: Source, *, method: str, rank: int | None, budget: float | None, scale: str | None,
    kinds: Sequence[str] | None, shrinkage: float | None, chunk: int = 8, inputs: Mapping[str, Any] | None = None,
) -> Factors:  # fmt: skip
    """`factorize`, on the graphs of a traced model, so that it is traced for no signature twice."""
    model = traced.model
    check_arguments(model, source, method, rank, budget, scale, shrinkage)
    marked = traced.marked(inputs)
    if source is not None:
        refuse_other_facts("what was measured", source.header.facts, marked.trace.facts)
    rows = find_paths(model, marked, method, kinds, source)
    if rank is not None:
        check_rank(model, marked, rank, list(rows), method, source)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    decomposed: dict[str, Decomposition] = {}
    ranked: dict[str, RankedMap] = {}
    for path, terms in decompositions(model, source, list(rows), method, scale, shrinkage):
        shape = terms.left.shape[0], terms.right.shape[1]
        ranked[path] = RankedMap(terms.weights, *shape, rows[path])
        if rank is not None:
            pairs[path] = terms.cut(rank)
        else:
            known = source.directions(path) if isinstance(source, Covariances) else None
            if known is not None:
                ranked[path] = replace(ranked[path], weights=terms.weights[: max(known // 2, 1)])
            decomposed[path] = _shortened(terms, ranked[path].most)
    if rank is None:
        assert budget is not None
        ranks = allocate_ranks(ranked, budget, chunk)
        pairs = {path: terms.cut(ranks[path]) for path, terms in decomposed.items()}
    macs = sum(ranked_map.cost(pairs[path][1].shape[0]) for path, ranked_map in ranked.items())
    arguments = _arguments(source, method, rank, budget, scale, shrinkage, chunk)
    arguments |= {"macs_share": macs / sum(ranked_map.macs for ranked_map in ranked.values())}
    measured = (
        {p: error_on(model, p, *pair, method, source) for p, pair in pairs.items()} if isinstance(source, Covariances) else {}
    )
    return Factors(
        type(model).__name__,
        fingerprint(model),
        dtype_name(model_dtype(model)),
        method,
        as_json(arguments),
        pairs,
        errors=measured,
        facts={} if source is None else source.header.facts,
    )


def source_kind(method: str) -> type[CalibrationStats] | type[Covariances] | None:
    """What a method is made from; None for nothing.

    Raises:
        PlanError: There is no such method.
    """
    if method not in METHODS:
        raise ArgumentError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    return SOURCES[method]


def decompositions(
    model: nn.Module,
    source: Source,
    paths: Sequence[str],
    method: str,
    scale: str | None = None,
    shrinkage: float | None = None,
) -> Iterator[tuple[str, Decomposition]]:
    """Every map's terms, one after the other: at full size they take more memory than the weights."""
    for path in paths:
        if isinstance(source, Covariances):
            yield path, _fitted(model, source, path, method, shrinkage)
            continue
        weight = weight_of(model, path)
        if isinstance(source, CalibrationStats):
            yield path, scaled_svd(weight, *channel_scales(source, path, method, scale or "both"))
        else:
            yield path, plain_svd(weight)


def _fitted(model: nn.Module, source: Covariances, path: str, method: str, shrinkage: float | None) -> Decomposition:
    """The terms of one map, or of one whole module, that covariances give."""
    cross = source.cross(path)[0] if method == "whole" else None
    covariance = shrunk(source, path, shrinkage)
    try:
        if cross is not None:
            return reduced_rank_regression(cross, covariance)
        weight = weight_of(model, path)
        return weighted_svd(weight, covariance)
    except PlanError as error:
        raise type(error)(f"{path}: {error}") from error


def _shortened(terms: Decomposition, most: int) -> Decomposition:
    """The first terms in float32, which is what may have to be kept of every map at once."""
    return replace(terms, left=terms.left[:, :most].float(), right=terms.right[:most].float())


def find_paths(
    model: nn.Module, marked: MarkedGraph, method: str, kinds: Sequence[str] | None, source: Source = None
) -> dict[str, int]:
    """Paths of what is factorised -> tokens that go through it per sample.

    Of covariances of a plan's own runs, what the plan corrects alone.
    """
    if method == "whole":
        calls = {path: [marked.trace.calls[path, 0].inputs[0]] for path in find_single_map_sites(marked, kinds)}
    else:
        maps = find_maps(model, marked, kinds)
        calls = {path: [node.all_input_nodes[0] for node in nodes] for path, nodes in maps.items()}
    if isinstance(source, Covariances) and source.plan:
        # Where nothing fits, what is missing is named further on.
        calls = {path: nodes for path, nodes in calls.items() if path in source.inputs} or calls
    return {path: sum(n.meta["val"].shape[:-1].numel() for n in nodes) // marked.batch for path, nodes in calls.items()}


def check_arguments(
    model: nn.Module,
    source: Source,
    method: str,
    rank: int | None,
    budget: float | None,
    scale: str | None,
    shrinkage: float | None,
) -> None:
    """Refuse arguments of `factorize` that are wrong by themselves, or a source of another model.

    Raises:
        PlanError: See there.
    """
    wanted = source_kind(method)
    check_choice(method, scale, shrinkage)
    if not (isinstance(source, wanted) if wanted is not None else source is None):
        raise ArgumentError(f"the method {method!r} is made from {WANTS[wanted]}; got {type(source).__name__}")
    if (rank is None) == (budget is None):
        raise ArgumentError(f"rank is {rank!r} and budget {budget!r}; give one of the two")
    if not all(has_data(p) for p in model.parameters()):
        raise ArgumentError("the model has no weights (it is on the meta device); factors are made of weights")
    if source is not None:
        header = source.header
        what = "the statistics are" if isinstance(source, CalibrationStats) else "the covariances are"
        refuse_model(what, (header.model, header.fingerprint, header.dtype), model)


def check_rank(model: nn.Module, marked: MarkedGraph, rank: int, paths: Sequence[str], method: str, source: Source) -> None:
    """Refuse a rank that one of some maps cannot have, or that a sketch of its increments does not show.

    Raises:
        PlanError: The message names the map and what it can have.
    """
    check_whole("rank", rank, 1)
    for path in paths:
        if method == "whole":
            call = marked.trace.calls[path, 0]
            shape = call.outputs[0].meta["val"].shape[-1], call.inputs[0].meta["val"].shape[-1]
        else:
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            shape = linear.out_features, linear.in_features
        if rank > min(shape):
            raise ArgumentError(f"rank {rank} is more than {path} [{shape[0]}, {shape[1]}] can have; at most {min(shape)}")
        known = source.directions(path) if isinstance(source, Covariances) else None
        if known is not None and known < min(2 * rank, shape[1]):
            raise ArgumentError(
                f"rank {rank} of {path} needs a sketch of {2 * rank} directions; these covariances keep {known}: measure with "
                f"sketch={2 * rank} (--sketch) or whole covariances"
            )


def _arguments(
    source: Source, method: str, rank: int | None, budget: float | None, scale: str | None, shrinkage: float | None, chunk: int
) -> dict[str, object]:
    """What made the factors."""
    arguments: dict[str, object] = {"rank": rank} if rank is not None else {"budget": budget, "chunk": chunk}
    if method in ("ca", "cd"):
        arguments |= {"scale": scale or "both"}
    if source is not None:
        header = source.header
        arguments |= {
            "scheduler": header.scheduler, "steps": header.steps, "samples": header.samples, "seed": header.seed,
            "guidance_scale": source.guidance_scale,
        }  # fmt: skip
    if isinstance(source, Covariances):
        arguments |= {"shrinkage": "estimated" if shrinkage is None else shrinkage, "periods": list(source.periods)}
        if source.plan:
            arguments |= {"plan": source.plan}
        if source.sketch_errors:
            arguments |= {"sketch_error": max(source.sketch_errors.values())}
    return arguments
