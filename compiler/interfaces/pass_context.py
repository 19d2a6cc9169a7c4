"""What a pass may see."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from stepgraph.node_facts import MARKER, output_of
from stepgraph.plan import Site
from stepgraph.plan.corrections import Forecast
from stepgraph.plan.liveness import Read

OPERATORS: dict[str, tuple[Callable[..., Any], ...]] = {"add": (operator.add, torch.add), "mul": (operator.mul, torch.mul)}


@dataclass(frozen=True)
class MapGroup:
    """Linear maps inside a site that read one and the same value, such as an attention's q, k and v.

    Attributes:
        input: Name of the node they read.
        maps: Names of their nodes; of the site's own value where one map spans the whole site.
        a: [C_out_i, r_i] each, in the model's dtype.
        b: [R, C_in], the maps' B one below the other, in the model's dtype.
    """

    input: str
    maps: tuple[str, ...]
    a: tuple[torch.Tensor, ...]
    b: torch.Tensor


@dataclass(frozen=True)
class PassContext:
    """One row of the plan, as the passes need it.

    Attributes:
        sites: All sites of the model.
        row: One action letter per site.
        reads: The stored values that the row reads.
        stores: (site index, part) of what is returned to be stored.
        written: Keys of the storages that the unrewritten graph writes to in place.
        forecasts: Site index -> its forecast in this row, and the number of the constant that holds its coefficients. All
            forecasts with the same coefficients share one.
        groups: Site index -> its linear maps, for the sites that are LOWRANK somewhere in the plan.
    """

    sites: tuple[Site, ...]
    row: str
    reads: tuple[Read, ...]
    stores: tuple[tuple[int, str], ...]
    written: frozenset[int]
    forecasts: Mapping[int, tuple[Forecast, int]] = field(default_factory=dict)
    groups: Mapping[int, tuple[MapGroup, ...]] = field(default_factory=dict)

    @staticmethod
    def results(graph: fx.Graph) -> list[fx.Node]:
        """The nodes whose values the graph returns."""
        output: fx.Node = output_of(graph)
        return output.all_input_nodes

    @staticmethod
    def borders(graph: fx.Graph) -> list[fx.Node]:
        """The nodes whose values the caller holds: the graph's inputs and results."""
        return [node for node in graph.nodes if node.op == "placeholder"] + PassContext.results(graph)


def markers(graph: fx.Graph) -> Iterator[tuple[int, fx.Node]]:
    """The markers of a graph with their site indices, in graph order."""
    for node in list(graph.nodes):
        if MARKER in node.meta:
            yield node.meta[MARKER], node


def slot_name(site: Site, part: str = "value", age: int = 1, tensor: int = 0) -> str:
    """Name of the graph input that carries a site's stored value, or one tensor of it."""
    name = "slot_" + site.name.replace(".", "_").replace("#", "_call").replace(":", "_out")
    suffix = "" if part == "value" else f"_{part}{tensor}"
    return name + suffix + (f"_age{age}" if age > 1 else "")


def coefficients_name(number: int) -> str:
    """Name of the graph input that carries a forecast's coefficients."""
    return f"coefficients_{number}"


def coefficient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coefficients, and of values in rank space, in a model of some dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def find_input(graph: fx.Graph, name: str) -> fx.Node:
    """The graph input of a name."""
    placeholder: fx.Node = next(node for node in graph.nodes if node.op == "placeholder" and node.target == name)
    return placeholder


def erase_unread(nodes: Iterable[fx.Node]) -> None:
    """Take those nodes out of their graph that nothing reads any more, one after the other."""
    for node in dict.fromkeys(nodes):
        if not node.users:
            node.graph.erase_node(node)


def is_call(node: object, name: str) -> bool:
    """Whether a node is an addition or multiplication ("add", "mul"), written as a method or as an operator."""
    if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs:
        return False
    return node.target == name if node.op == "call_method" else node.target in OPERATORS[name]


def factors_of(node: object, name: str) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The two arguments of an addition or multiplication of nodes, in both orders."""
    if isinstance(node, fx.Node) and is_call(node, name):
        first, second = node.args
        if isinstance(first, fx.Node) and isinstance(second, fx.Node):
            yield first, second
            yield second, first
