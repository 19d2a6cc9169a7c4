"""Copies of graphs in half the time that `fx.Graph.graph_copy` takes, which looks at every argument of every node anew."""

from collections.abc import Mapping

from torch import fx
from torch.fx.node import Argument, map_arg


def copy_node(node: fx.Node, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A copy of a node in a graph, which reads the copies of what the node reads."""
    copy = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
    # Behind its making: given then, arguments are searched for symbols, and no graph of ours has any.
    copy.args = map_arg(node.args, copies.__getitem__)
    if node.kwargs:
        copy.kwargs = map_arg(node.kwargs, copies.__getitem__)
    copy.meta = node.meta.copy()
    return copy


def copy_nodes(source: fx.Graph, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> Argument:
    """Copy all nodes but the output; `copies` takes down which is whose.

    Returns:
        What the source returns, of the copies.
    """
    for node in source.nodes:
        if node.op == "output":
            returned: Argument = map_arg(node.args[0], copies.__getitem__)
            return returned
        copies[node] = copy_node(node, graph, copies)
    return None


__all__ = ["copy_node", "copy_nodes"]
