"""What the nodes of a graph know about themselves: the keys of `node.meta`, in one place.

Beside these there are torch's own: `val` (the node's fake value) and `nn_module_stack` (the modules it was traced in).
"""

from typing import Any, NamedTuple

from torch import fx

# On a marker: the index of its site in the plan, an int.
MARKER = "marker"
# The name of the innermost module site that the node belongs to, a str.
SITE = "site"
# Multiply-accumulates of the node for the whole traced batch, an int.
MACS = "macs"
# Keys of the storages that the node writes to in place, a frozenset of ints.
MUTATES = "mutates"
# On an input that carries a stored value: the index of its site, an int.
SLOT = "slot"
# On a projection into rank space: (index of its site, number of its group of linear maps).
PROJECTION = "projection"
# On an input: the number of the table that it carries, an int.
TABLE = "table"
# On a fused operation: who runs it, an `OpCall`.
PROVIDER = "provider"


class OpCall(NamedTuple):
    """A fused operation in a graph, and who runs it."""

    op: str
    provider: str

    def __str__(self) -> str:
        """As executables list it: "lowrank_delta by triton"."""
        return f"{self.op} by {self.provider}"


def op_of(node: fx.Node) -> str:
    """The name of the fused operation that a node runs once its provider is chosen; empty for any other node."""
    call: OpCall | None = node.meta.get(PROVIDER)
    return call.op if call is not None else ""


def output_of(graph: fx.Graph) -> Any:
    """The node that returns the graph's results, a tuple of nodes; as torch.fx types them, its arguments could be anything."""
    return next(iter(reversed(graph.nodes)))
