"""Fuse gates with the residual additions behind them."""

from typing import Any

import torch
from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext, erase_unread, factors_of
from stepgraph.compiler.marking.graphs import storages_of
from stepgraph.node_facts import MACS, SLOT
from stepgraph.ops import gated_residual


def fuse_gated_residual(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Replace x + gate * value by one operation, and runs of them, as reused sites leave them, by one pass over x.

    Before, with the values of two reused sites (all [B, N, C] but the gates, which are [B, 1, C])::

        %gated = mul(%gate_1, %slot_1)
        %x1 = add(%gated, %x)
        %gated_1 = mul(%gate_2, %slot_2)
        %x2 = add(%gated_1, %x1)

    After: `%x2 = gated_residual(%x, [%gate_1, %gate_2], [%slot_1, %slot_2])`. A reused value that is added without a gate, as
    PixArt's cross-attention is, joins the run that it stands behind with a gate of ones. Returns the number of additions that
    are gone.
    """
    count = 0
    ones: dict[tuple[torch.Size, torch.dtype], fx.Node] = {}
    for node in list(gm.graph.nodes):
        match = _matched(node)
        ungated = _ungated(node) if match is None else None
        if ungated is not None:
            x, value = ungated
            gate: fx.Node = x.args[1][0]  # type: ignore[index, assignment]
            # Streams of several widths have gates of as many.
            width = gate.meta["val"].shape, gate.meta["val"].dtype
            if width not in ones:
                ones[width] = _ones_like(gm.graph, gate, x)
            match = x, ones[width], value, node
        if match is None or any(storages_of(n) & ctx.written for n in match[:3]):
            continue
        x, gate, value, gated = match
        arguments: tuple[Any, list[fx.Node], list[fx.Node]] = (x, [gate], [value])
        if x.target is gated_residual and len(x.users) == 1:
            start, gates, values = x.args
            arguments = (start, [*gates, gate], [*values, value])  # type: ignore[misc]
        with gm.graph.inserting_before(node):
            fused = gm.graph.call_function(gated_residual, arguments)
        fused.meta |= {key: entry for key, entry in node.meta.items() if key != MACS}
        node.replace_all_uses_with(fused)
        erase_unread((node, gated, x))
        count += 1
    return count


def _matched(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """x, gate, value and the product of the two."""
    for gated, x in factors_of(node, "add"):
        if len(gated.users) != 1:
            continue
        for gate, value in factors_of(gated, "mul"):
            tensors = [n.meta["val"] for n in (gate, value, x) if isinstance(n.meta.get("val"), torch.Tensor)]
            shapes = [tuple(t.shape) for t in tensors]
            if len(shapes) < 3 or len({t.dtype for t in tensors}) > 1 or shapes[1] != shapes[2] or len(shapes[2]) != 3:
                continue
            batch, tokens, channels = shapes[2]
            if shapes[0] in ((batch, 1, channels), (1, 1, channels)) and tokens > 1:
                return x, gate, value, gated
    return None


def _ungated(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """A run of gated residuals that nothing else reads, and the stored value that is added behind it."""
    for value, x in factors_of(node, "add"):
        shapes = [(n.meta["val"].shape, n.meta["val"].dtype) for n in (value, x, node) if "val" in n.meta]
        if (
            x.target is gated_residual
            and len(x.users) == 1
            and SLOT in value.meta
            and len(shapes) == 3
            and len(set(shapes)) == 1
        ):
            return x, value
    return None


def _ones_like(graph: fx.Graph, gate: fx.Node, before: fx.Node) -> fx.Node:
    """A gate that changes nothing."""
    with graph.inserting_before(before):
        ones = graph.call_function(torch.ones_like, (gate,))
    ones.meta |= {"val": torch.ones_like(gate.meta["val"])}
    return ones
