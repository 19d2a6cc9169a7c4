"""The model's graph with more values returned: what calibration, fits and training watch."""

import operator
from collections.abc import Callable, Sequence

from torch import fx, nn

from stepgraph.compiler.marking.graphs import storages_of, written_storages
from stepgraph.compiler.marking.mark_sites import MarkedGraph, bound_copy, unmark
from stepgraph.node_facts import MARKER, output_of

# A value in the marked graph, and the node that reads it; None for the value as it is right after it was made.
Watched = tuple[fx.Node, fx.Node | None]


def watched_graph(
    marked: MarkedGraph,
    model: nn.Module,
    sites: Sequence[int] = (),
    values: Sequence[Watched] = (),
    prepare: Callable[[fx.GraphModule], object] | None = None,
) -> fx.GraphModule:
    """A copy of the marked graph, bound to a model, that returns the values of sites and of other nodes behind its results.

    Before::

        %value = site_value(%ff, site=transformer_blocks.0.ff)
        %residual = site_value(%tokens, %tokens_in, site=stack_residual)
        return (%sample,)

    After, with both sites watched::

        %sub = sub(%tokens, %tokens_in)
        return (%sample, %ff, %sub)

    What the graph writes to in place is copied: a site's value where the site ends, another where it is read.

    Args:
        marked: Not changed.
        model: Whose parameters and modules the graph uses.
        sites: Indices of sites, in the order in which their values are returned.
        values: Of nodes of the marked graph; returned behind the sites'.
        prepare: Rewrites the copy before values are looked for; its markers must stay.
    """
    copies: dict[fx.Node, fx.Node] = {}
    gm = bound_copy(marked, model, copies)
    if prepare is not None:
        prepare(gm)
    graph, written = gm.graph, written_storages(gm.graph)
    markers = {node.meta[MARKER]: node for node in graph.nodes if MARKER in node.meta}
    returned = [_site_value(markers[index], written) for index in sites]
    returned += [_as_read(copies[node], None if reader is None else copies[reader], written) for node, reader in values]
    output = output_of(graph)
    output.args = ((*output.args[0], *returned),)
    unmark(graph)
    graph.lint()
    gm.recompile()
    return gm


def _site_value(marker: fx.Node, written: frozenset[int]) -> fx.Node:
    """What a marker's site is worth: of the stack's residual, the tokens out minus the tokens in."""
    if len(marker.args) == 1:
        return _as_read(marker, None, written)
    with marker.graph.inserting_after(marker):
        difference = marker.graph.call_function(operator.sub, marker.args[:2])
    difference.meta |= {"val": marker.meta["val"]}
    return difference


def _as_read(value: fx.Node, reader: fx.Node | None, written: frozenset[int]) -> fx.Node:
    """A value as its reader finds it: a copy made right before that where the graph writes to it."""
    if not storages_of(value) & written:
        return value
    graph = value.graph
    with graph.inserting_before(reader) if reader is not None else graph.inserting_after(value):
        copy = graph.call_method("clone", (value,))
    copy.meta |= {"val": value.meta["val"]}
    return copy
