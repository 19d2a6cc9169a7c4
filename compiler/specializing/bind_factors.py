"""The linear maps of LOWRANK sites with their factors, and what their increments cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from stepgraph.compiler.interfaces.pass_context import MapGroup, coefficient_dtype
from stepgraph.compiler.marking.graphs import live_nodes, macs_of
from stepgraph.compiler.marking.maps_of_sites import maps_of_sites
from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.env import get_logger
from stepgraph.errors import PlanError
from stepgraph.fingerprint import model_dtype
from stepgraph.node_facts import MARKER, output_of
from stepgraph.plan import LOWRANK, CachePlan
from stepgraph.plan.corrections import Increment
from stepgraph.plan.factors import Factors
from stepgraph.runtime.program.stated_facts import refuse_other_facts


def group_maps(
    marked: MarkedGraph, model: nn.Module, indices: Sequence[int], factors: Factors
) -> dict[int, tuple[MapGroup, ...]]:
    """The linear maps of some sites by what they read, with their factors in the model's dtype and on its device.

    Raises:
        PlanError: A site has no linear map, or the factors have none of a rank that fits for one of them.
    """
    maps = maps_of_sites(marked, model)
    return {i: _groups(marked, model, i, [node for node, site in maps.items() if site == i], factors) for i in indices}


def _groups(
    marked: MarkedGraph, model: nn.Module, index: int, maps: Sequence[fx.Node], factors: Factors
) -> tuple[MapGroup, ...]:
    site = marked.sites[index]
    device, dtype = next(model.parameters()).device, model_dtype(model)
    groups: dict[str, list[tuple[fx.Node, str]]] = {}
    if site.path in factors.maps and not isinstance(model.get_submodule(site.path), nn.Linear):
        marker = next(node for node in marked.graph.nodes if node.meta.get(MARKER) == index)
        source_node = marked.trace.calls[site.path, site.call].inputs[0]
        shape = tuple(matrix.shape[i] for i, matrix in enumerate(factors.maps[site.path]))
        if shape != (marker.meta["val"].shape[-1], source_node.meta["val"].shape[-1]):
            raise PlanError(
                f"the factors of {site.path} are for a map {list(shape)}; the site's is "
                f"[{marker.meta['val'].shape[-1]}, {source_node.meta['val'].shape[-1]}]"
            )
        groups[source_node.name] = [(marker, site.path)]
    else:
        for node in maps:
            read = node.args[0]
            assert isinstance(read, fx.Node)
            groups.setdefault(read.name, []).append((node, str(node.target)))
    if not groups:
        raise PlanError(
            f"site {site.name} ({site.kind}) has no linear map inside, so that LOWRANK has nothing to correct; use REUSE or "
            f"FORECAST"
        )
    bound = []
    for source, members in groups.items():
        missing = [path for _, path in members if path not in factors.maps]
        if missing:
            raise PlanError(f"site {site.name}: the factors have none for {missing[0]}; they have {_some(factors.maps)}")
        pairs = [tuple(t.to(device, dtype) for t in factors.maps[path]) for _, path in members]
        stacked = torch.cat([b for _, b in pairs])
        bound.append(MapGroup(source, tuple(node.name for node, _ in members), tuple(a for a, _ in pairs), stacked))
    return tuple(bound)


def _some(maps: Mapping[str, object]) -> str:
    names = list(maps)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "none at all"


def bind_factors(
    plan: CachePlan, marked: MarkedGraph, model: nn.Module, factors: Factors | None
) -> tuple[CachePlan, dict[int, tuple[MapGroup, ...]]]:
    """The plan with the costs of its LOWRANK sites under some factors, and these sites' maps; as it is where it has none.

    Raises:
        PlanError: The factors are of another model, or of one whose forward read other values; others than it was bound to; or
            missing where it has LOWRANK sites.
    """
    corrected = sorted(
        {i for row in plan.rows for i, action in enumerate(row) if action == LOWRANK and not plan.sites[i].output}
    )
    tables = sorted({(step, i) for (step, i), forecast in plan.forecasts.items() if forecast.per_channel})
    if factors is not None:
        factors.refuse_other(model)
        refuse_other_facts("what these factors were made from", factors.facts, marked.trace.facts)
        if plan.header.factors not in ("", factors.digest):
            raise PlanError(f"the plan is bound to the factors {plan.header.factors}, but given are {factors.digest}")
    if not corrected and not tables:
        if factors is not None:
            get_logger("factors").warning(
                "the plan corrects nothing with the factors given; see stepgraph.lowrank (plan correct)"
            )
        return plan, {}
    if factors is None:
        what = f"LOWRANK, first at site {plan.sites[corrected[0]].name}" if corrected else "forecasts per channel"
        raise PlanError(
            f"the plan has {what}, but no factors are given; pass factors=stepgraph.factorize(...) (--factors FILE)"
        )
    for step, i in tables:
        table = factors.affine.get(f"{plan.sites[i].name}/{step}")
        if table is None or len(table) != len(plan.forecasts[step, i].terms):
            raise PlanError(f"step {step}, site {plan.sites[i].name}: the factors have no coefficients per channel for it")
    groups = group_maps(marked, model, corrected, factors)
    increments = {i: increment_of(marked, i, site_groups) for i, site_groups in groups.items()}
    return replace(plan, increments=increments, header=replace(plan.header, factors=factors.digest)), groups


def increment_of(marked: MarkedGraph, index: int, groups: Sequence[MapGroup]) -> Increment:
    """What a LOWRANK of a site costs, per sample."""
    nodes = {node.name: node for node in marked.graph.nodes}
    ranks, new, projection, size, maps = {}, 0, 0, 0, set()
    for group in groups:
        x = nodes[group.input].meta["val"]
        tokens = x.numel() // x.shape[-1]
        projection += tokens * group.b.numel()
        size += tokens * group.b.shape[0] * (8 if coefficient_dtype(x.dtype) == torch.float64 else 4)
        for name, a in zip(group.maps, group.a, strict=True):
            node = nodes[name]
            path = marked.sites[index].path if MARKER in node.meta else str(node.target)
            ranks[path] = a.shape[1]
            new += tokens * a.numel()
            size += node.meta["val"].numel() * node.meta["val"].element_size()
            maps.add(node)
    # What is still needed once the maps' outputs come from elsewhere: their inputs, and what else the output depends on.
    output = output_of(marked.graph)
    left = live_nodes([output, *(nodes[group.input] for group in groups)], cut=maps) - maps
    saved = macs_of(live_nodes([output]) - left) - new - projection
    batch = marked.batch
    return Increment(ranks, saved // batch, projection // batch, size // batch)
