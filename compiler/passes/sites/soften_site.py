"""Mix stored and fresh values by a weight that can be trained."""

import torch
from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext, markers, slot_name
from stepgraph.errors import CompileError
from stepgraph.plan import MODULE_KINDS, Site


def soften_site(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Make the value of every read module site (1 - beta) * stored + beta * fresh, before its gate (arXiv 2406.01733).

    Before, for the site `transformer_blocks.0.ff` (float32 [B, N, C])::

        %ff = call_module[transformer_blocks.0.ff.net.2](%gelu)
        %value = site_value(%ff, site=transformer_blocks.0.ff)
        %gated = mul(%gate, %value)

    After::

        %slot_transformer_blocks_0_ff = placeholder                        # float32 [B, N, C]
        %beta_transformer_blocks_0_ff = placeholder                        # float32 [B, 1, 1], 0 reuses and 1 computes
        %ff = call_module[transformer_blocks.0.ff.net.2](%gelu)
        %soft = lerp(%slot_transformer_blocks_0_ff, %ff, %beta_transformer_blocks_0_ff)
        %value = site_value(%soft, site=transformer_blocks.0.ff)
        %gated = mul(%gate, %value)

    The marker stays and marks the mixture, so `store_site` returns what a later step reads. beta has the value's number of
    dimensions and its dtype; one weight per sample lets a batch mix different steps. Both ends are exact: the mixture at 0 is
    the stored value and at 1 the fresh one.

    Raises:
        CompileError: A read site is not a module site, whose value alone can be mixed before its gate.
    """
    count = 0
    for index, marker in markers(gm.graph):
        if index not in {read.site for read in ctx.reads}:
            continue
        site = ctx.sites[index]
        if site.kind not in MODULE_KINDS:
            raise CompileError(f"site {site.name} is of kind {site.kind!r}; soft plans mix {', '.join(MODULE_KINDS)} only")
        fresh = marker.args[0]
        value: torch.Tensor = marker.meta["val"]
        stored = _input(gm.graph, slot_name(site), value.clone())
        beta = _input(gm.graph, beta_name(site), value.new_empty((value.shape[0],) + (1,) * (value.ndim - 1)))
        with gm.graph.inserting_before(marker):
            soft = gm.graph.call_function(torch.lerp, (stored, fresh, beta))
        soft.meta |= {"val": value.clone()}
        marker.args = (soft, *marker.args[1:])
        marker.meta["val"] = soft.meta["val"]
        count += 1
    return count


def beta_name(site: Site) -> str:
    """Name of the graph input that carries a site's weight."""
    return slot_name(site).replace("slot_", "beta_", 1)


def _input(graph: fx.Graph, name: str, value: torch.Tensor) -> fx.Node:
    """A new input of the graph, behind those it has."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        node = graph.placeholder(name)
    node.meta |= {"val": value}
    return node
