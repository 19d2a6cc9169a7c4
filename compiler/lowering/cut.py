"""Cut a variant into pieces: what lies within one transformer block, before the first or behind the last.

Runs of reused sites, which are one operation across blocks, stand between them (docs/design.md, decision 4).
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import fx

from stepgraph.compiler.marking.graphs import written_storages
from stepgraph.errors import CompileError
from stepgraph.node_facts import op_of
from stepgraph.ops import gated_residual
from stepgraph.weight_kinds import own_kinds


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of nodes of a variant.

    Attributes:
        nodes: In order.
        inputs: Nodes of the variant whose values it reads; weights are none.
        results: Nodes of its own whose values are read outside.
        kernel: Whether it is a single operation, which needs no compiling, or a module that is called as it is.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    kernel: bool = False


def cut(gm: fx.GraphModule, is_block: Callable[[str], bool]) -> list[Piece]:
    """The pieces of a variant, in order.

    A graph that writes in place is one piece; a module whose weights are no plain tensors is one of its own.

    Raises:
        CompileError: The graph has both.
    """
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    opaque = opaque_nodes(gm)
    in_one = bool(written_storages(gm.graph))
    if in_one and opaque:
        raise CompileError(
            f"the forward writes to its values in place, and {opaque[0].target} has quantised weights, so that the graph "
            f"cannot be cut around it; pass backend='eager'"
        )
    places = {node: "" if in_one else _place(node, is_block) for node in nodes} | {node: f"run {node.name}" for node in opaque}
    return [_piece(run, run[0] in opaque) for run in _runs(nodes, places)]


def opaque_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of modules whose weights are no plain tensors, which nothing may take apart."""
    calls = [node for node in gm.graph.nodes if node.op == "call_module"]
    return [node for node in calls if own_kinds(gm.get_submodule(str(node.target)))]


def _piece(run: Sequence[fx.Node], opaque: bool) -> Piece:
    inside = set(run)
    read = dict.fromkeys(source for node in run for source in node.all_input_nodes if source not in inside)
    inputs = tuple(node for node in read if node.op != "get_attr")
    results = tuple(node for node in run if any(user not in inside for user in node.users))
    return Piece(tuple(run), inputs, results, kernel=opaque or _is_kernel(run))


def _place(node: fx.Node, is_block: Callable[[str], bool]) -> str:
    """The path of the block that a node belongs to, or a place of its own for one pass over several reused sites."""
    if _passes_over_several(node):
        return f"run {node.name}"
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    return next((path for path in _paths(stack) if is_block(path)), "")


def _paths(stack: Mapping[str, Any]) -> Iterable[str]:
    for key, entry in stack.items():
        yield entry[0] if isinstance(entry, tuple) else key


def _passes_over_several(node: fx.Node) -> bool:
    return op_of(node) == gated_residual.name and len(node.args[1]) > 1  # type: ignore[arg-type]


def _is_kernel(run: Sequence[fx.Node]) -> bool:
    return len(run) == 1 and _passes_over_several(run[0])


def _runs(nodes: Sequence[fx.Node], places: Mapping[fx.Node, str]) -> list[list[fx.Node]]:
    """Neighbours of one place together. A tuple is taken apart where it is made."""
    home: dict[fx.Node, list[fx.Node]] = {}
    runs = [list(run) for _, run in groupby(nodes, key=lambda node: places[node])]
    for run in runs:
        for node in run:
            home[node] = run
    for node in nodes:
        source = node.args[0] if node.target is operator.getitem else None
        if not isinstance(source, fx.Node) or isinstance(source.meta.get("val"), torch.Tensor):
            continue
        if home.get(source, home[node]) is not home[node]:
            home[node].remove(node)
            home[source].append(node)
            home[node] = home[source]
    return [run for run in runs if run]
