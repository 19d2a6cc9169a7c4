"""Fuse a normalisation with its adaLN modulation."""

import operator
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from stepgraph.compiler.interfaces.pass_context import PassContext, erase_unread, factors_of, is_call
from stepgraph.compiler.marking.graphs import storages_of
from stepgraph.node_facts import MACS, MUTATES
from stepgraph.ops import modulated_norm


def fuse_modulated_norm(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Replace norm(x) * (1 + scale) + shift by one operation.

    Before, all [B, N, C] but scale and shift, which are [B, 1, C]::

        %norm = call_module[transformer_blocks.0.norm1.norm](%x)         # LayerNorm without affine parameters
        %more = add(%scale, 1)
        %scaled = mul(%norm, %more)
        %modulated = add(%scaled, %shift)

    After: `%modulated = modulated_norm(%x, %scale, %shift, 1e-6)`.
    """
    count = 0
    for node in list(gm.graph.nodes):
        match = _matched(gm, node)
        if match is None or any(storages_of(n) & ctx.written for n in match[0]):
            continue
        (x, scale, shift), eps, inner = match
        with gm.graph.inserting_before(node):
            fused = gm.graph.call_function(modulated_norm, (x, scale, shift, eps))
        fused.meta |= {key: value for key, value in node.meta.items() if key != MACS}
        node.replace_all_uses_with(fused)
        erase_unread((node, *inner))
        count += 1
    return count


def _matched(gm: fx.GraphModule, node: fx.Node) -> tuple[tuple[fx.Node, fx.Node, fx.Node], float, list[fx.Node]] | None:
    """(x, scale, shift), eps, and the nodes between them that go, outermost first."""
    for scaled, shift in factors_of(node, "add"):
        if len(scaled.users) != 1:
            continue
        for norm, more in factors_of(scaled, "mul"):
            eps = _plain_norm(gm, norm)
            # One norm under several modulations (SD3.5) is part of each, unless something else reads it too.
            if eps is None or not all(is_call(user, "mul") for user in norm.users):
                continue
            if not all(_per_channel(n, norm) for n in (more, shift)):
                continue
            x, values = norm.args[0], [n.meta["val"] for n in (norm, more, shift, node)]
            if not isinstance(x, fx.Node) or len({v.dtype for v in values} | {x.meta["val"].dtype}) > 1:
                continue
            scale = _without_one(gm.graph, more)
            if scale is not None and values[0].shape == values[-1].shape:
                return (x, scale, shift), eps, [scaled, norm, more]
    return None


def _without_one(graph: fx.Graph, more: fx.Node) -> fx.Node | None:
    """The scale of `1 + scale`, which may have been given its token dimension before or after the addition."""
    if more.op == "call_function" and more.target is operator.getitem:
        added = more.args[0]
        scale = _without_one(graph, added) if isinstance(added, fx.Node) and is_call(added, "add") else None
        if scale is None:
            return None
        with graph.inserting_before(more):
            indexed = graph.call_function(operator.getitem, (scale, more.args[1]))
        indexed.meta |= {key: value for key, value in more.meta.items() if key != MUTATES}
        return indexed
    if is_call(more, "add"):
        for value, one in (more.args, more.args[::-1]):
            if isinstance(value, fx.Node) and type(one) in (int, float) and one == 1:
                return value
    return None


def _plain_norm(gm: fx.GraphModule, node: fx.Node) -> float | None:
    """The eps of a LayerNorm over the channels without affine parameters; None for anything else."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if not isinstance(module, nn.LayerNorm) or module.weight is not None or module.bias is not None:
            return None
        return float(module.eps) if len(module.normalized_shape) == 1 else None
    if node.op == "call_function" and node.target is F.layer_norm:
        arguments: dict[str, Any] = (
            dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), node.args, strict=False)) | node.kwargs
        )
        plain = (
            arguments.get("weight") is None and arguments.get("bias") is None and len(tuple(arguments["normalized_shape"])) == 1
        )
        return float(arguments.get("eps", 1e-5)) if plain else None
    return None


def _per_channel(node: fx.Node, x: fx.Node) -> bool:
    """Whether a modulation is the same for all tokens: [B, 1, C] or [1, 1, C]."""
    shape, like = node.meta["val"].shape, x.meta["val"].shape
    return len(shape) == 3 and shape[1] == 1 and shape[2] == like[2] and shape[0] in (1, like[0])
