"""Questions about a traced graph that several passes ask."""

from collections.abc import Collection, Iterable

import torch
from torch import fx

from stepgraph.compiler.tracing.traced_tensor import storage_key
from stepgraph.node_facts import MACS, MARKER, MUTATES, output_of


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
    pending = list(outputs)
    graph = pending[0].graph if pending else fx.Graph()
    memories = _memories(graph, frozenset(cut))
    writers = [node for node in graph.nodes if node.meta.get(MUTATES)]
    live: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            if node not in cut:
                pending.extend(inputs_of(node))
        if not pending and writers:
            # A write to memory that something live lies in is live too, although nothing reads its result.
            touched = frozenset().union(*(memory for n in live for memory in memories[n].values()))
            pending = [w for w in writers if w not in live and any(memories[w][k] & touched for k in w.meta[MUTATES])]
    return live


def erase_dead(graph: fx.Graph) -> int:
    """Erase what the outputs do not depend on, but for the graph's inputs; returns how many nodes went."""
    live = live_nodes([output_of(graph)])
    dead = [node for node in reversed(graph.nodes) if node not in live and node.op != "placeholder"]
    for node in dead:
        graph.erase_node(node)
    return len(dead)


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node's value is made of."""
    # A marker is the identity of its first argument; the tokens it may have beside are not part of its value.
    return node.all_input_nodes[:1] if MARKER in node.meta else node.all_input_nodes


def _memories(graph: fx.Graph, cut: Collection[fx.Node] = ()) -> dict[fx.Node, dict[int, frozenset[fx.Node]]]:
    """For every node and written storage it touches, the first nodes of the chains of arguments that pass it on.

    A rewritten graph can have two tensors where the traced one had one: a stored value that stands in for a value carries the
    same storage key, but what wrote to the value before does not write to the stored one.
    """
    written = written_storages(graph)
    memories: dict[fx.Node, dict[int, frozenset[fx.Node]]] = {}
    if not written:
        return memories
    for node in graph.nodes:
        of_node: dict[int, frozenset[fx.Node]] = {}
        for key in (storages_of(node) | node.meta.get(MUTATES, frozenset())) & written:
            sources = [] if node in cut else [memories[n][key] for n in node.all_input_nodes if key in memories[n]]
            of_node[key] = frozenset().union(*sources) if sources else frozenset((node,))
        memories[node] = of_node
    return memories


def macs_of(nodes: Iterable[fx.Node]) -> int:
    """Multiply-accumulates of some nodes, for the whole traced batch."""
    return sum(node.meta.get(MACS, 0) for node in nodes)


def written_storages(graph: fx.Graph) -> frozenset[int]:
    """Keys of all storages that some node of the graph writes to in place."""
    return frozenset().union(*(node.meta.get(MUTATES, frozenset()) for node in graph.nodes))
