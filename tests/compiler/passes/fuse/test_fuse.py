"""The fused operations in whole graphs: how many there are, what is gone, and that the numbers stay."""

import operator
from collections import Counter

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.corrections import LINEARS, both, factors_of, maps_of, plan_of
from helpers.distance import SAME_RUN, error
from helpers.families import FLUX, IMAGE, TEXT, WIDTH, flux_inputs, flux_plan
from helpers.lowrank_runs import OPERATIONS, run_glyph_dit
from helpers.oracle_families import FluxOracle, run_flow
from helpers.tiny import inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.compiler.marking.mark_sites import bound_copy
from stepgraph.compiler.passes.fuse.erase_identities import erase_identities
from stepgraph.compiler.passes.fuse.fuse_gated_residual import fuse_gated_residual
from stepgraph.compiler.passes.fuse.fuse_modulated_norm import fuse_modulated_norm
from stepgraph.csrc.library import native
from stepgraph.errors import OpError
from stepgraph.node_facts import SLOT, op_of
from stepgraph.ops import OPS, gated_residual, lowrank_delta, modulated_norm

# Per row: (modulated_norm, gated_residual, lowrank_delta, lowrank_input) in the graphs of a DiT of two blocks.
ROWS = {
    # Two norms a block and the head's; two residuals a block.
    ("C", "C"): (5, 4, 0, 0),
    # Nothing stands between the residuals of reused sites: one pass for all four.
    ("R", "R"): (1, 1, 0, 0),
    # The attention's norm goes into the increment of q, k and v, its gate into that of the output projection.
    ("L", "C"): (3, 2, 4, 0),
    # The feed-forward's norm and gate, likewise.
    ("L", "L"): (1, 0, 8, 0),
    # Block by block: a gate of its own that merges with nothing, as the increment needs what comes after it.
    ("R", "L"): (1, 2, 4, 0),
}


def calls(exe: sg.Executable, step: int) -> Counter:
    return Counter(exe.default.variants[exe.default.rows[step]].providers)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("provider", ["reference", None])
def test_what_a_dit_is_fused_to(dit, row, provider, monkeypatch):
    if provider:
        monkeypatch.setenv("STEPGRAPH_PROVIDERS", provider)
    plan, maps = plan_of(dit, {"attn": "C" + row[0], "ff": "C" + row[1]}), maps_of(dit)
    got, wanted, exe = both(dit, plan, maps, exact=False)
    assert error(got, wanted) < 2e-6
    found = Counter()
    for name, count in calls(exe, 1).items():
        op, _, by = name.partition(" by ")
        found[op] += count
        assert by == "reference" or not provider
    assert tuple(found[op] for op in ("modulated_norm", "gated_residual", "lowrank_delta", "lowrank_input")) == ROWS[row]
    stored = 2 * 2 * (row[0] == "L") + 2 * 2 * (row[1] == "L")
    assert sum(count for name, count in calls(exe, 0).items() if name.startswith("lowrank_input")) == stored


def test_a_run_of_reused_sites_is_one_pass_over_the_tokens(dit):
    exe = both(dit, plan_of(dit, {"attn": "CR", "ff": "CR"}), exact=False)[2]
    graph = exe.default.variants[exe.default.rows[1]].graph.graph
    (fused,) = (node for node in graph.nodes if op_of(node) == "gated_residual")
    assert [node.meta[SLOT] for node in fused.args[2]] == [0, 1, 3, 4]
    assert not [node for node in graph.nodes if node.target in ("mul", operator.mul) and node.meta["val"].ndim == 3]


def rewritten(model, given) -> tuple[torch.fx.GraphModule, PassContext]:
    """A traced model without markers."""
    from stepgraph.compiler.marking.graphs import written_storages
    from stepgraph.compiler.marking.traced_model import marked_graph
    from stepgraph.compiler.passes.sites.erase_markers import erase_markers

    marked = marked_graph(model, given)
    gm = bound_copy(marked, model)
    context = PassContext(marked.sites, "C" * len(marked.sites), (), (), written_storages(marked.graph))
    erase_markers(gm, context)
    return gm, context


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_rewrite_counts(family):
    if family == "dit":
        model, given = tiny_dit(), inputs(2)
        # Two norms and two gates a block, and the head's norm; a dropout and a division by 1 behind each attention, a
        # dropout inside each feed-forward, and conversions to float32.
        norms, gates = 5, 4
    else:
        torch.manual_seed(0)
        model, given = diffusers.FluxTransformer2DModel(**FLUX).eval(), flux_inputs(2)
        double, single = len(model.transformer_blocks), len(model.single_transformer_blocks)
        # Image and text, before the attention and before the feed-forward; one a single block; the head's.
        norms, gates = 4 * double + single + 1, 4 * double + single
    gm, context = rewritten(model, given)
    before = [value.clone() for value in gm(**given)] if family == "dit" else None
    assert erase_identities(gm, context) > 0
    assert fuse_modulated_norm(gm, context) == norms
    assert fuse_gated_residual(gm, context) == gates
    # A second time there is nothing left.
    assert erase_identities(gm, context) == fuse_modulated_norm(gm, context) == fuse_gated_residual(gm, context) == 0
    gm.graph.lint()
    gm.recompile()
    targets = Counter(node.target for node in gm.graph.nodes)
    assert (targets[modulated_norm], targets[gated_residual]) == (norms, gates)
    assert not [node for node in gm.graph.nodes if node.op == "call_module" and "norm1.norm" in str(node.target)]
    if before is not None:
        with torch.no_grad():
            assert error(gm(**given)[0], before[0]) < 1e-6


def test_what_flux_splits_and_joins_again_between_its_single_blocks_is_one_run():
    torch.manual_seed(0)
    model, scheduler = diffusers.FluxTransformer2DModel(**FLUX).eval(), diffusers.FlowMatchEulerDiscreteScheduler()
    actions = dict.fromkeys(("attn", "context_attn", "ff", "context_ff", "proj_out"), "CRC")
    plan = flux_plan(model, scheduler, actions, steps=3)
    exe = sg.compile(model, plan, flux_inputs(2), backend="eager")
    wanted, got = (run_flow(who, scheduler, 3, flux_inputs(2)) for who in (FluxOracle.of(model, plan), exe.session()))
    assert error(got[-1], wanted[-1]) < 2e-6
    nodes = exe.default.variants[exe.default.rows[1]].graph.graph.nodes
    runs = [len(node.args[1]) for node in nodes if op_of(node) == "gated_residual"]
    # Image and text of two double blocks, and both together in two single ones.
    assert sorted(runs) == [2, 4, 4]
    # Positions and time embeddings are joined still, and text and image once, before the first single block.
    joined = [node for node in nodes if node.target is torch.cat and node.meta["val"].shape == (2, IMAGE + TEXT, WIDTH)]
    assert len(joined) == 1


def test_exact_graphs_are_left_alone(dit):
    exe = both(dit, plan_of(dit, {"attn": "CL", "ff": "CR"}), maps_of(dit))[2]
    assert {op.partition(" ")[0] for op in exe.providers()} == {"lowrank_delta", "lowrank_input"}


@pytest.mark.parametrize("name", ["fuse_modulated_norm", "fuse_gated_residual", "fuse_lowrank", "erase_identities"])
def test_fusion_can_be_switched_off(dit, name, monkeypatch):
    plan, maps = plan_of(dit, {"attn": "CL", "ff": "CL"}), maps_of(dit)
    whole = both(dit, plan, maps, exact=False)[2]
    monkeypatch.setenv("STEPGRAPH_DISABLE_PASS", name)
    got, wanted, exe = both(dit, plan, maps, exact=False)
    assert error(got, wanted) < 2e-6
    assert exe.providers() != whole.providers()


def test_a_shared_norm_stays(dit):
    """A modulated value that something else reads too is not taken into an increment."""
    graph = torch.fx.Graph()
    x, y, p, a, b, scale, shift = (graph.placeholder(name) for name in ("x", "y", "p", "a", "b", "scale", "shift"))
    norm = graph.call_function(modulated_norm, (x, scale, shift, 1e-6))
    delta = graph.call_function(lowrank_delta, (norm, [y], p, [a], b))
    graph.output((graph.call_function(operator.getitem, (delta, 0)), norm))
    from stepgraph.compiler.passes.fuse.fuse_lowrank import fuse_lowrank

    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert fuse_lowrank(gm, PassContext((), "", (), (), frozenset())) == 0


def test_an_op_that_nobody_takes_does_not_compile(dit, monkeypatch):

    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "triton")
    with pytest.raises(OpError, match=r"no provider takes .*: triton"):
        both(dit, plan_of(dit, {"attn": "CL"}), maps_of(dit), exact=False)


def test_latents_stay_the_callers_own(dit):
    """A result is never a stored value, also where an operation between the two was taken out."""
    plan = plan_of(dit, {"hidden": "CRR", "ff": "CLC"})
    exe = sg.compile(dit, plan, inputs(2), backend="eager", factors=factors_of(dit, maps_of(dit)))
    wanted = sg.sample(exe, tiny_scheduler("ddim"), noise(2), **labels(1, 2))
    session = exe.session()
    for t in tiny_scheduler("ddim").timesteps[:1]:
        session(**inputs(2, timestep=int(t))).sample.fill_(float("nan"))
    assert torch.isfinite(session(**inputs(2)).sample).all()
    assert torch.isfinite(wanted).all()


# -- whole runs of the shipped model -------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(native().missing), reason="no native library")
def test_the_kernels_of_the_cpu_run_by_default():
    drift, providers = run_glyph_dit(steps=4)
    assert drift < SAME_RUN
    assert {"modulated_norm by cpu", "lowrank_delta by cpu"} <= set(providers)


@pytest.mark.skipif(bool(native().missing), reason="no native library")
def test_a_forced_provider_runs_everything(monkeypatch):
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "cpu")
    drift, providers = run_glyph_dit(steps=4, layers=2)
    assert drift < SAME_RUN
    assert set(providers) == {f"{op} by cpu" for op in OPERATIONS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unchanged_input_gives_the_stored_outputs(dtype, monkeypatch):
    """By default, at a size that kernels take: the stored p and the new one come from the same provider. Fused gates and
    residuals round once where others round twice, so they are left out here.
    """
    monkeypatch.setenv("STEPGRAPH_DISABLE_PASS", "fuse_lowrank,fuse_gated_residual,fuse_modulated_norm")
    model = tiny_dit(num_layers=1, num_attention_heads=16, attention_head_dim=72, sample_size=16).to(dtype)
    plan = sg.lowrank(sg.make_plan("interval", model=model, scheduler=tiny_scheduler("ddim"), steps=2, every=2))
    # Any factors do: at zero drift the increment is zero whatever they are.
    linears = {f"transformer_blocks.0.{name}": model.get_submodule(f"transformer_blocks.0.{name}") for name in LINEARS}
    maps = {name: (torch.randn(part.out_features, 64), torch.randn(64, part.in_features)) for name, part in linears.items()}
    factors = factors_of(model, maps)
    given = {**sg.example_inputs(model, 4), "hidden_states": torch.randn(4, 4, 16, 16).to(dtype)}
    given["timestep"] = torch.full((4,), 500)
    session = sg.compile(model, plan, given, backend="eager", factors=factors, hoist=False).session()
    assert torch.equal(session(**given).sample, session(**given).sample)


def test_exact_mode_says_that_it_runs_the_references(dit, monkeypatch, caplog):
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "cpu")
    exe = both(dit, plan_of(dit, {"attn": "CL"}), maps_of(dit))[2]
    assert all(name.endswith("by reference") for name in exe.providers())
    assert "STEPGRAPH_PROVIDERS=cpu is not asked" in caplog.text


def test_every_pass_is_right_on_the_shipped_model(monkeypatch):
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    assert run_glyph_dit(steps=2, layers=2)[0] < SAME_RUN


@pytest.mark.parametrize("pair", [{"scale": torch.zeros(1, 8)}, {"gate": torch.zeros(1, 8)}])
def test_half_a_pair_is_refused(pair):
    x = torch.zeros(1, 3, 8)
    with pytest.raises(OpError, match="only one of a pair is given"):
        OPS["lowrank_delta"].reference(x, [x], torch.zeros(1, 3, 2), [torch.zeros(8, 2)], torch.zeros(2, 8), **pair)


def test_as_many_coefficients_as_values():
    with pytest.raises(OpError, match="4 coefficients for 2 values; expected as many, or one more"):
        OPS["linear_combination"].reference([torch.zeros(3)] * 2, torch.zeros(4))
