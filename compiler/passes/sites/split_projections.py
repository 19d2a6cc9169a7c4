"""Projections of joined values, split so that what is stored of a reused value is its partial product."""

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.nn import functional as F

from stepgraph.compiler.interfaces.pass_context import erase_unread
from stepgraph.compiler.interfaces.program_context import ModelContext
from stepgraph.compiler.marking.mark_sites import site_value
from stepgraph.node_facts import MACS, MARKER
from stepgraph.plan import COMPUTE, DEAD, LOWRANK, REUSE, CachePlan


def split_projections(gm: fx.GraphModule, ctx: ModelContext) -> int:
    """Move the markers of values that meet in one projection behind their own parts of it, where the plan reuses them.

    Before, in a single block of FLUX (attention [B, N, C] and MLP [B, N, 4 C] through the weight W [C, 5 C])::

        %attn_value = site_value(%attn, site=...attn)
        %mlp_value = site_value(%mlp, site=...act_mlp)
        %joined = cat([%attn_value, %mlp_value], dim=2)                       # [B, N, 5 C]
        %proj = call_module[...proj_out](%joined)                             # [B, N, C]

    After, where both are reused somewhere; of a site that never is, the marker stays where it was::

        %attn_part = linear(%attn, %weight[:, :C], %bias)                     # [B, N, C]
        %attn_value = site_value(%attn_part, site=...attn)
        %mlp_part = linear(%mlp, %weight[:, C:])                              # [B, N, C]
        %mlp_value = site_value(%mlp_part, site=...act_mlp)
        %proj = add(%attn_value, %mlp_value)

    Nothing else changes for the passes behind: a reuse of the attention now saves its part of the projection too, and the
    stored MLP is a quarter in size. Equal to the unsplit projection but for rounding, in the same number of multiplications.
    Left alone are sites that the plan forecasts or corrects, projections that it corrects, and anything but a plain
    `nn.Linear` (a LoRA, quantised weights).
    """
    plan, count = ctx.plan, 0
    moved = _plainly_reused(plan)
    corrected = {i for row in plan.rows for i, action in enumerate(row) if action == LOWRANK}
    for node in list(gm.graph.nodes):
        index = node.meta.get(MARKER)
        if index is not None and plan.sites[index].kind == "proj_out" and index not in corrected:
            count += _split(gm, node.args[0], moved)
    return count


def _plainly_reused(plan: CachePlan) -> frozenset[int]:
    """The sites that are reused somewhere, and nowhere forecast or corrected."""
    columns = [{row[i] for row in plan.rows} for i in range(len(plan.sites))]
    return frozenset(i for i, letters in enumerate(columns) if REUSE in letters and letters <= {COMPUTE, REUSE, DEAD})


def _split(gm: fx.GraphModule, projection: object, moved: frozenset[int]) -> bool:
    """Split one projection, if one of the values that it joins is to move."""
    graph, joined = gm.graph, _joined(gm, projection)
    if not isinstance(projection, fx.Node) or joined is None:
        return False
    values = list(joined.args[0])  # type: ignore[arg-type]
    if not any(isinstance(value, fx.Node) and value.meta.get(MARKER) in moved for value in values):
        return False
    total: fx.Node | None = None
    with graph.inserting_before(projection):
        weight, bias = (_parameter(gm, projection, name) for name in ("weight", "bias"))
        start = 0
        for value in values:
            width = value.meta["val"].shape[-1]
            marker = value if value.meta.get(MARKER) in moved else None
            source = value.args[0] if marker else value
            # The bias goes with the first part: it is the same in every step.
            part = _partial(graph, projection, source, weight, bias if total is None else None, (start, start + width))
            if marker is not None:
                part = _marked_again(graph, marker, part)
            start += width
            total = part if total is None else _sum(graph, projection, total, part)
    assert total is not None
    projection.replace_all_uses_with(total)
    erase_unread((projection, joined, *values))
    return True


def _joined(gm: fx.GraphModule, projection: object) -> fx.Node | None:
    """The concatenation along the channels that a plain linear map reads and nothing else does."""
    if not isinstance(projection, fx.Node) or projection.op != "call_module":
        return None
    module = gm.get_submodule(str(projection.target))
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or len(projection.args) != 1:
        return None
    joined = projection.args[0]
    if not isinstance(joined, fx.Node) or joined.target is not torch.cat or len(joined.users) != 1 or len(joined.args) != 1:
        return None
    values, dim = joined.args[0], joined.kwargs.get("dim", 0)
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, fx.Node) for value in values):
        return None
    only_joined = all(value.users.keys() == {joined} for value in values if isinstance(value, fx.Node))
    dims = joined.meta["val"].ndim
    return joined if only_joined and isinstance(dim, int) and dim % dims == dims - 1 else None


def _parameter(gm: fx.GraphModule, projection: fx.Node, name: str) -> fx.Node | None:
    """A node that reads the projection's weight or bias; None where it has no bias."""
    tensor = getattr(gm.get_submodule(str(projection.target)), name)
    if tensor is None:
        return None
    node = gm.graph.get_attr(f"{projection.target}.{name}")
    node.meta |= {"val": projection.meta["val"].new_empty(tensor.shape, dtype=tensor.dtype)}
    return node


def _partial(
    graph: fx.Graph, projection: fx.Node, value: object, weight: fx.Node | None, bias: fx.Node | None, columns: tuple[int, int]
) -> fx.Node:
    """The product of one value [B, N, C_i] with its columns of the weight [C_out, C], in the projection's place."""
    assert isinstance(value, fx.Node)
    assert isinstance(weight, fx.Node)
    index = (slice(None), slice(*columns))
    part = graph.call_function(operator.getitem, (weight, index))
    # With its product in one region.
    part.meta |= {"val": weight.meta["val"][index], "nn_module_stack": projection.meta["nn_module_stack"]}
    product = graph.call_function(F.linear, (value, part, bias))
    macs = value.meta["val"].numel() * projection.meta["val"].shape[-1]
    product.meta |= projection.meta | {"val": projection.meta["val"].clone(), MACS: macs}
    return product


def _marked_again(graph: fx.Graph, marker: fx.Node, value: fx.Node) -> fx.Node:
    """The marker of the same site behind another value."""
    again = graph.call_function(site_value, (value,), dict[str, str](marker.kwargs))  # type: ignore[arg-type]
    site_meta: Mapping[str, object] = {key: meta for key, meta in marker.meta.items() if key != "val"}
    again.meta |= {**site_meta, "val": value.meta["val"]}
    return again


def _sum(graph: fx.Graph, projection: fx.Node, first: fx.Node, second: fx.Node) -> fx.Node:
    total = graph.call_function(torch.add, (first, second))
    total.meta |= projection.meta | {"val": projection.meta["val"].clone(), MACS: 0}
    return total
