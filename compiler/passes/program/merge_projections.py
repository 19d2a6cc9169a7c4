"""Linear maps of one module that read one value, run as one.

An attention's q, k and v read the same tokens. As one product [B, N, C] x [C, 3 C] the tokens are read once and there is more
work between two synchronisations of the threads.

The stacked weight is a copy, so that two things have to hold: it must follow the model's own weights, and it must be worth its
memory. Regions on CPUs keep a packed copy of every linear weight anyway; there `merged_linear` keeps one packed copy of the
stack in place of one of each part, by the versions of all parts, and memory stays as it is. Elsewhere (GPUs, eager graphs,
`prepack=False`) the copy would come on top of the model, and a captured CUDA graph would go on reading it after a weight has
changed. The other way, making the model's parameters views of a stack, changes the model that is compiled, which may be shared
and saved. So maps are merged where their weights are packed, and nowhere else.

Maps of one module only: FLUX's single blocks have a fourth map of the same tokens, the MLP's, but a plan may compute it
without the attention, and the weight would then be packed twice.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import fx, nn

from stepgraph.compiler.interfaces.program_context import ProgramContext, RowGraphs
from stepgraph.compiler.marking.graphs import storages_of, written_storages
from stepgraph.node_facts import MACS
from stepgraph.runtime.program.packed_linear import merged_linear

Takes = Callable[[torch.Tensor, torch.Tensor], bool]


def merge_projections(program: RowGraphs, ctx: ProgramContext) -> int:
    """Merge the linear maps of every variant (`merge_maps`), after hoisting: what is computed once a prompt is not worth a
    stacked copy. Returns how many merged maps there are.
    """
    return sum(merge_maps(gm, ctx.packs) for gm in program.graphs)


def merge_maps(gm: fx.GraphModule, takes: Takes) -> int:
    """Replace the linear maps of one module that read one value by one map and views of its result; returns how many of these
    there are.

    Before, in an attention (x [B, N, C_in], weights [C_i, C_in])::

        %q = call_module[...attn1.to_q](%x)                                       # [B, N, C_q]
        %k = call_module[...attn1.to_k](%x)                                       # [B, N, C_k]
        %v = call_module[...attn1.to_v](%x)                                       # [B, N, C_v]

    After::

        %all = merged_linear(%x, [%w_q, %w_k, %w_v], [%b_q, %b_k, %b_v])          # [B, N, C_q + C_k + C_v]
        %q = narrow(%all, -1, 0, C_q)                                             and %k, %v behind it

    Left alone is what is not a plain `nn.Linear` (a LoRA, quantised weights), what is written to in place, and results of which
    the graph takes a view that a part of a wider tensor does not have.

    Args:
        gm: A variant's graph.
        takes: Whether a linear map of (x, weight) runs with packed weights.
    """
    written, groups = written_storages(gm.graph), dict[Any, list[fx.Node]]()
    for node in gm.graph.nodes:
        linear = _plain_linear(gm, node)
        if linear is None or (storages_of(node) | storages_of(node.args[0])) & written:
            continue
        if takes(node.args[0].meta["val"], linear.weight):
            module = str(node.target).rpartition(".")[0]
            groups.setdefault((node.args[0], module, linear.weight.dtype, linear.bias is None), []).append(node)
    return sum(_merge(gm, maps) for maps in groups.values() if len({node.target for node in maps}) > 1)


def _plain_linear(gm: fx.GraphModule, node: fx.Node) -> nn.Linear | None:
    """The module of a linear map with weights of its own that have versions."""
    if node.op != "call_module" or len(node.args) != 1 or not isinstance(node.args[0], fx.Node) or node.kwargs:
        return None
    module = gm.get_submodule(str(node.target))
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or module.weight.is_inference():
        return None
    return module


def _merge(gm: fx.GraphModule, maps: list[fx.Node]) -> bool:
    """Merge linear maps, where every view of their results can be taken of parts of one tensor."""
    graph, x, widths = gm.graph, maps[0].args[0], [node.meta["val"].shape[-1] for node in maps]
    starts = list(accumulate(widths, initial=0))
    whole = maps[0].meta["val"].new_empty((*maps[0].meta["val"].shape[:-1], starts[-1]))
    parts = [whole.narrow(-1, start, width) for start, width in zip(starts, widths, strict=False)]
    views = [_views(node, part) for node, part in zip(maps, parts, strict=True)]
    if any(map_views is None for map_views in views):
        return False
    with graph.inserting_before(maps[0]):
        lists = [_parameters(gm, maps, name) for name in ("weight", "bias")]
        joined = graph.call_function(merged_linear, (x, *lists))
        joined.meta |= maps[0].meta | {"val": whole, MACS: sum(node.meta.get(MACS, 0) for node in maps)}
        narrowed = [graph.call_method("narrow", (joined, -1, s, w)) for s, w in zip(starts, widths, strict=False)]
    for node, part, value, map_views in zip(maps, narrowed, parts, views, strict=True):
        part.meta |= node.meta | {"val": value, MACS: 0}
        for view, view_value in (map_views or {}).items():
            view.meta["val"] = view_value
        node.replace_all_uses_with(part)
        graph.erase_node(node)
    return True


def _parameters(gm: fx.GraphModule, maps: list[fx.Node], name: str) -> list[fx.Node]:
    """Nodes that read the maps' weights or biases; none where they have no bias."""
    nodes = []
    for node in maps:
        tensor = getattr(gm.get_submodule(str(node.target)), name)
        if tensor is not None:
            read = gm.graph.get_attr(f"{node.target}.{name}")
            read.meta |= {"val": node.meta["val"].new_empty(tensor.shape, dtype=tensor.dtype)}
            nodes.append(read)
    return nodes


def _views(node: fx.Node, value: Any) -> dict[fx.Node, Any] | None:
    """The views of a node's result, as they are where that is `value`; None where one cannot be taken."""
    values, pending = {node: value}, list(node.users)
    for view in pending:
        if view.op == "output" or view in values or not storages_of(view) & storages_of(node):
            continue
        args, kwargs = fx.node.map_arg((view.args, view.kwargs), lambda n: values.get(n, n.meta["val"]))
        run = getattr(args[0], str(view.target)) if view.op == "call_method" else view.target
        try:
            values[view] = run(*args[1:], **kwargs) if view.op == "call_method" else run(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError):
            return None
        pending.extend(view.users)
    del values[node]
    return values
