"""Full-size models without weights: published sizes, and how many operations are fused in their real graphs."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from torch import fx, nn

from helpers.full_size import full_size
from helpers.paths import PUBLISHED
from stepgraph.compiler.entry.load_model import load_scheduler
from stepgraph.compiler.importers import invardiff_flux_book
from stepgraph.compiler.marking.describe import make_header
from stepgraph.compiler.marking.graphs import macs_of
from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.compiler.marking.traced_model import marked_graph
from stepgraph.compiler.passes.program.merge_projections import merge_maps
from stepgraph.compiler.specializing.specialize import rewrite_model, specialize
from stepgraph.config import CompileConfig
from stepgraph.node_facts import op_of
from stepgraph.ops import gated_residual, modulated_norm
from stepgraph.plan import MODULE_KINDS, CachePlan
from stepgraph.runtime.program.packed_linear import merged_linear


@cache
def traced(name: str) -> tuple[nn.Module, MarkedGraph]:
    """A full-size model on the meta device, and its graph."""
    model = full_size(name)
    return model, marked_graph(model)


@pytest.mark.slow
def test_the_published_sizes():
    (pixart, pixart_graph), (sd3, sd3_graph) = traced("pixart-alpha"), traced("sd3-medium")
    assert {p.device.type for model in (pixart, sd3) for p in model.parameters()} == {"meta"}
    # The papers count 0.6 and 2 billion parameters.
    counts = [sum(p.numel() for p in model.parameters()) for model in (pixart, sd3)]
    assert counts == pytest.approx([0.611e9, 2.03e9], rel=1e-3)
    n, m, c = 32 * 32, 120, 1152
    block = (4 + 2 + 8) * n * c * c + 2 * m * c * c + 2 * n * (n + m) * c
    around = n * (4 * 4 * c + c * 4 * 8) + 256 * c + 7 * c * c + m * (4096 * c + c * c)
    assert pixart_graph.macs == 28 * block + around
    assert Counter(site.kind for site in pixart_graph.sites) == {
        "attn": 28, "cross_attn": 28, "ff": 28, "block": 28, "stack_residual": 1, "hidden": 1, "output": 1,
    }  # fmt: skip
    n, m, c = 64 * 64, 333, 1536
    # Per token: q, k, v, output and feed-forward; per block: two modulations of six times the width.
    block = 12 * (n + m) * c * c + 2 * (n + m) * (n + m) * c + 12 * c * c
    around = n * (16 * 4 * c + c * 4 * 16) + m * 4096 * c + (256 + 2048) * c + 2 * c * c + 2 * c * c
    # Of the last block's text only q, k and v, and a modulation of twice the width.
    assert sd3_graph.macs == 24 * block + around - (9 * m * c * c + 4 * c * c)
    assert Counter(site.kind for site in sd3_graph.sites) == {
        "attn": 24, "context_attn": 23, "ff": 24, "context_ff": 23, "stack_residual": 1, "hidden": 1, "output": 1,
    }  # fmt: skip
    assert type(load_scheduler("pixart-alpha:random")).__name__ == "DPMSolverMultistepScheduler"
    assert load_scheduler("sd3-medium:random").config["shift"] == 3.0


def fused(graph: fx.Graph) -> tuple[int, list[int]]:
    """How many norms have their modulation in one operation, and how many updates each gated residual makes."""
    ops = {node: op_of(node) for node in graph.nodes if op_of(node)}
    residuals = [len(node.args[1]) for node, op in ops.items() if op == gated_residual.name]
    return list(ops.values()).count(modulated_norm.name), residuals


# Model -> (norms, gated residuals of single updates) where everything is computed, and what is left of them where every module
# site is reused: the norm of the output head, and one gated residual for each run of updates.
FUSED = {
    # Two norms and two updates in each of 28 blocks, and the head.
    "dit-xl-2-256": (2 * 28 + 1, 2 * 28, [2 * 28]),
    # The cross-attentions of 28 blocks are added without a norm and without a gate; as stored values they join the run.
    "pixart-alpha": (2 * 28 + 1, 2 * 28, [3 * 28]),
    # 24 joint blocks: two norms and two updates for the image and as many for the text, whose last block has a norm only.
    # Nobody reads the text where every attention is reused.
    "sd3-medium": (2 * 24 + 2 * 23 + 1 + 1, 2 * 24 + 2 * 23, [2 * 24]),
    # 19 double blocks like those, and 38 single ones with one of each; where all are reused, text and image are joined between.
    "flux-dev": (4 * 19 + 38 + 1, 4 * 19 + 38, [2 * 19, 2 * 19, 38]),
}

# Model -> maps per merged one, and how many of these, where everything is computed. Nothing is hoisted here: in the loop of a
# compiled PixArt the text's keys and values are not there, and its cross-attentions have nothing to merge.
MERGED = {
    "dit-xl-2-256": {3: 28},
    "pixart-alpha": {3: 28, 2: 28},
    # Image and text of 24 joint blocks: also the last one's text, of which nothing but queries, keys and values is computed.
    "sd3-medium": {3: 2 * 24},
    # Image and text of 19 double blocks, and 38 single ones, whose MLP's map of the same tokens belongs to another module.
    "flux-dev": {3: 2 * 19 + 38},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_every_modulation_gate_and_projection_of_a_full_size_model_is_fused(name):
    model, marked = traced(name)
    norms, gates, runs = FUSED[name]
    kinds = {site.kind for site in marked.sites} & set(MODULE_KINDS)
    header = make_header(model, load_scheduler(f"{name}:random"), 3, marked)
    plan = CachePlan.build(header, marked.sites, dict.fromkeys(kinds, "CRC"))
    specialized = specialize(marked, model, plan, config=CompileConfig("eager"))
    assert specialized.rows == (0, 1, 2)
    storing, reusing, full = (graph.graph for graph in specialized.graphs)
    assert fused(full) == (norms, [1] * gates)
    assert fused(storing) == (norms, [1] * gates)
    assert fused(reusing) == (1, runs)
    assert not [node for node in reusing.nodes if node.op == "call_module" and ".attn" in str(node.target)]
    # The weights are on the meta device, which packs nothing.
    counts = [merge_maps(gm, lambda x, weight: True) for gm in specialized.graphs]
    assert counts == [sum(MERGED[name].values()), 0, sum(MERGED[name].values())]
    assert Counter(len(node.args[1]) for node in full.nodes if node.target is merged_linear) == MERGED[name]


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published plan files are not at hand")
@pytest.mark.parametrize(("name", "whole", "split"), [("fast", 3.54, 3.98), ("med1", 3.00, 3.06)])
def test_the_published_flux_books_save_more_where_the_projection_is_split(name, whole, split):
    """The multiplications of the specialised graphs, against the book's own table of hits and a block's formulas."""
    model, marked = traced("flux-dev")
    book = json.loads((PUBLISHED / f"invardiff_flux_28_{name}.json").read_text())
    header = make_header(model, load_scheduler("flux-dev:random"), 28, marked)
    plan = CachePlan.build(header, marked.sites, invardiff_flux_book.actions(book, marked.sites, 28))
    halves = rewrite_model(marked, model, plan, CompileConfig("eager"))
    specialized = specialize(halves, model, replace(plan, sites=halves.sites), config=CompileConfig("eager"))
    macs = [macs_of(specialized.graphs[variant].graph.nodes) for variant in specialized.rows]
    n, m, c = 4096 + 512, 512, 3072
    # q, k, v and the attention over all tokens; then image and text projected, or a half of the single block's projection.
    attention = 4 * n * c * c + 2 * n * n * c
    cost = {"attn": attention, "ff": 8 * (n - m) * c * c, "context_ff": 8 * m * c * c}
    double, single = book["transformer_cache_book"], book["single_transformer_cache_book"]
    # A joint attention is skipped where both of its tables say so; nothing is in the first step.
    joint = [
        [image and text for image, text in zip(*rows, strict=True)]
        for rows in zip(double["attn"], double["context_attn"], strict=True)
    ]
    saved = [0]
    for step in range(1, 28):
        own = sum(cost[kind] * sum((joint if kind == "attn" else double[kind])[step]) for kind in cost)
        saved.append(own + attention * sum(single["attn"][step]) + 8 * n * c * c * sum(single["mlp"][step]))
    hidden = next(site.macs for site in marked.sites if site.kind == "hidden")
    gates = book["step_cache_book"]
    assert macs == [marked.macs - (hidden if gate else own) for gate, own in zip([False, *gates[1:]], saved, strict=True)]
    assert round(28 * marked.macs / sum(macs), 2) == split
    assert round(plan.summary().ideal_speedup, 2) == whole
