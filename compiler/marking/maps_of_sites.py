"""Which linear maps belong to which site."""

from torch import fx, nn

from stepgraph.compiler.marking.mark_sites import LiveGraph, MarkedGraph
from stepgraph.node_facts import MARKER, SITE
from stepgraph.plan import MODULE_KINDS


def maps_of_sites(marked: MarkedGraph, owner: nn.Module) -> dict[fx.Node, int]:
    """The calls of linear maps that belong to module sites, in graph order -> index of the site.

    They are the maps inside the site's module; where that has none (FLUX's `mlp` is an activation), those that only it needs. A
    joint attention's maps belong to its first output. Norms' and gates' own maps belong to no site.

    Args:
        marked: The graph with its sites.
        owner: The model, or whatever has the modules that the graph calls.
    """
    linears = [
        node
        for node in marked.graph.nodes
        if node.op == "call_module" and isinstance(owner.get_submodule(str(node.target)), nn.Linear)
    ]
    sites = {site.name: i for i, site in enumerate(marked.sites) if site.kind in MODULE_KINDS and not site.output}
    site_of = {node: sites[node.meta[SITE]] for node in linears if node.meta.get(SITE) in sites}
    empty = set(sites.values()) - set(site_of.values())
    live = LiveGraph(marked.graph)
    for marker in [node for node in marked.graph.nodes if node.meta.get(MARKER) in empty]:
        only = live.saved_by([marker])
        site_of |= {node: marker.meta[MARKER] for node in linears if node in only and node not in site_of}
    return {node: site_of[node] for node in linears if node in site_of}
