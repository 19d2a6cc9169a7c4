"""Let low-rank increments take the normalisation before them and the gate behind them along."""

import operator

from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.compiler.marking.graphs import storages_of
from stepgraph.ops import gated_residual, lowrank_delta, modulated_norm


def fuse_lowrank(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Merge `modulated_norm` -> `lowrank_delta` -> `gated_residual` into one operation, where nothing else reads between them.

    Before::

        %modulated = modulated_norm(%x, %scale, %shift, 1e-6)
        %maps = lowrank_delta(%modulated, [%y], %p, [%a], %b)
        %out = %maps[0]
        %next = gated_residual(%h, [%gate], [%out])

    After: `%next = lowrank_delta(%x, [%y], %p, [%a], %b, %scale, %shift, 1e-6, %gate, %h)[0]`.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is lowrank_delta:
            count += _take_norm(gm.graph, node)
    for node in list(gm.graph.nodes):
        if node.target is gated_residual and not any(storages_of(n) & ctx.written for n in node.all_input_nodes):
            count += _take_gate(gm.graph, node)
    return count


def _take_norm(graph: fx.Graph, delta: fx.Node) -> int:
    norm = delta.args[0]
    assert isinstance(norm, fx.Node)
    if norm.target is not modulated_norm or len(norm.users) > 1:
        return 0
    x, scale, shift, eps = norm.args
    delta.args = (x, *delta.args[1:])
    delta.kwargs = {**delta.kwargs, "scale": scale, "shift": shift, "eps": eps}
    graph.erase_node(norm)
    return 1


def _take_gate(graph: fx.Graph, residual: fx.Node) -> int:
    x, gates, values = residual.args
    part = values[0] if isinstance(values, (list, tuple)) and len(values) == 1 else None
    if not isinstance(part, fx.Node) or part.target is not operator.getitem or len(part.users) > 1:
        return 0
    delta = part.args[0]
    if not isinstance(delta, fx.Node) or delta.target is not lowrank_delta or len(delta.args[1]) > 1:  # type: ignore[arg-type]
        return 0
    # It moves to where the residual is known.
    with graph.inserting_before(residual):
        moved = graph.call_function(
            lowrank_delta,
            delta.args,
            {**delta.kwargs, "gate": gates[0], "residual": x},  # type: ignore[index]
        )
        moved.meta |= delta.meta
        gated = graph.call_function(operator.getitem, (moved, 0))
        gated.meta |= residual.meta
    residual.replace_all_uses_with(gated)
    for gone in (residual, part, delta):
        graph.erase_node(gone)
    return 1
