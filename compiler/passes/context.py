"""What a pass may see."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from stepgraph.plan import Site


@dataclass(frozen=True)
class PassContext:
    """One row of the plan, as the passes need it.

    Attributes:
        sites: All sites of the model.
        row: One action letter per site.
        reads: Indices of the sites whose stored value is read.
        stores: Indices of the sites whose value is returned to be stored.
        written: Keys of the storages that the unrewritten graph writes to in place.
    """

    sites: tuple[Site, ...]
    row: str
    reads: tuple[int, ...]
    stores: tuple[int, ...]
    written: frozenset[int]

    @staticmethod
    def results(graph: fx.Graph) -> list[fx.Node]:
        """The nodes whose values the graph returns."""
        output: fx.Node = next(iter(reversed(graph.nodes)))
        return output.all_input_nodes

    @staticmethod
    def borders(graph: fx.Graph) -> list[fx.Node]:
        """The nodes whose values the caller holds: the graph's inputs and results."""
        return [node for node in graph.nodes if node.op == "placeholder"] + PassContext.results(graph)


def markers(graph: fx.Graph) -> Iterator[tuple[int, fx.Node]]:
    """The markers of a graph with their site indices, in graph order."""
    for node in list(graph.nodes):
        if "marker" in node.meta:
            yield node.meta["marker"], node


def slot_name(site: Site) -> str:
    """Name of the graph input that carries a site's stored value."""
    return "slot_" + site.name.replace(".", "_").replace("#", "_call").replace(":", "_out")
