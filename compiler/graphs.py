"""Questions about a traced graph that several passes ask."""

from collections.abc import Collection, Iterable

import torch
from torch import fx

from stepgraph.compiler.trace import storage_key


def storages_of(node: fx.Node) -> frozenset[int]:
    """Keys of the storages that a node's value lies in."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return frozenset(storage_key(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))


def live_nodes(outputs: Iterable[fx.Node], cut: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that `outputs` depend on, in-place operations on what they read included.

    Args:
        outputs: Where the walk starts.
        cut: Nodes whose arguments are not followed, as if their values were given.
    """
    outputs = list(outputs)
    writers = [node for node in outputs[0].graph.nodes if node.meta.get("mutates")] if outputs else []
    live: set[fx.Node] = set()
    pending = outputs
    while pending:
        node = pending.pop()
        if node in live:
            continue
        live.add(node)
        if node not in cut:
            # A marker is the identity of its first argument; the tokens it may have beside are not part of its value.
            pending.extend(node.args[:1] if "marker" in node.meta else node.all_input_nodes)  # type: ignore[arg-type]
        if not pending and writers:
            # A write to a storage that something live lies in is live too, although nothing reads its result.
            touched = frozenset().union(*(storages_of(n) for n in live))
            pending = [w for w in writers if w not in live and w.meta["mutates"] & touched]
    return live


def macs_of(nodes: Iterable[fx.Node]) -> int:
    """Multiply-accumulates of some nodes, for the whole traced batch."""
    return sum(node.meta.get("macs", 0) for node in nodes)


def written_storages(graph: fx.Graph) -> frozenset[int]:
    """Keys of all storages that some node of the graph writes to in place."""
    return frozenset().union(*(node.meta.get("mutates", frozenset()) for node in graph.nodes))
