"""Specialised graphs: what is dead is gone, what is left is exact, and equal rows share a graph."""

import pytest
import torch

import stepgraph as sg
from helpers.oracle import Oracle, run_loop
from helpers.tiny import inputs, labels, noise, tiny_scheduler
from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.compiler.marking.graphs import written_storages
from stepgraph.compiler.marking.mark_sites import bound_copy
from stepgraph.compiler.marking.traced_model import marked_graph
from stepgraph.compiler.specializing.passes import ROW_PASSES, is_wanted
from stepgraph.compiler.specializing.specialize import specialize
from stepgraph.config import CompileConfig
from stepgraph.node_facts import output_of
from stepgraph.plan.liveness import VALUE, Read, traffic

BLOCKS = ("transformer_blocks.0", "transformer_blocks.1")


def compile_actions(model, scheduler, steps: int, actions, batch: int = 1, **options) -> sg.Executable:
    plan = sg.make_plan("manual", model=model, scheduler=scheduler, steps=steps, actions=actions, **options)
    return sg.compile(model, plan, inputs(batch), backend="eager", exact=True, hoist=False)


def graph_of(exe: sg.Executable, step: int) -> torch.fx.Graph:
    return exe.default.variants[exe.default.rows[step]].graph.graph


def modules_of(graph: torch.fx.Graph) -> set[str]:
    return {node.target for node in graph.nodes if node.op == "call_module"}


def attributes_of(graph: torch.fx.Graph) -> set[str]:
    return {node.target for node in graph.nodes if node.op == "get_attr"}


# -- dead code -----------------------------------------------------------------------------------------------------------

EMBEDDER = (
    "timestep_embedder.linear_1",
    "timestep_embedder.act",
    "timestep_embedder.linear_2",
    "class_embedder.embedding_table",
)
GATES = {f"{block}.norm1.{name}" for block in BLOCKS for name in (*(f"emb.{part}" for part in EMBEDDER), "silu", "linear")}
FIRST_EMBEDDER = {f"{BLOCKS[0]}.norm1.emb.{part}" for part in EMBEDDER}
HEAD = {"norm_out", "proj_out_1", "proj_out_2"}
# What a row keeps, to the last module: gates stay exact, everything that only fed the reused value is gone.
KEPT = {
    "modules": ({"attn": "CR", "ff": "CR"}, GATES | HEAD | {"pos_embed.proj"}, {"pos_embed.pos_embed"}),
    "hidden": ({"hidden": "CR"}, FIRST_EMBEDDER | HEAD, set()),
    "stack_residual": ({"stack_residual": "CR"}, FIRST_EMBEDDER | HEAD | {"pos_embed.proj"}, {"pos_embed.pos_embed"}),
    "last block": ({"block": "CR"}, FIRST_EMBEDDER | HEAD, set()),
    "output": ({"output": "CR"}, set(), set()),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_a_reused_row_keeps(dit, ddim, case):
    actions, modules, attributes = KEPT[case]
    exe = compile_actions(dit, ddim, 2, actions)
    graph = graph_of(exe, 1)
    assert modules_of(graph) == modules
    assert attributes_of(graph) == attributes
    functions = {getattr(node.target, "__name__", node.target) for node in graph.nodes if node.op == "call_function"}
    assert not functions & {"scaled_dot_product_attention", "site_value"}
    assert modules_of(graph_of(exe, 0)) > modules


def test_a_reused_output_keeps_nothing_at_all(dit, ddim):
    graph = graph_of(compile_actions(dit, ddim, 2, {"output": "CR"}), 1)
    # The clone keeps the slot apart from the result, which belongs to the caller.
    assert [node.target for node in graph.nodes if node.op not in ("placeholder", "output")] == ["clone"]


def test_one_reused_module_takes_only_its_own_things_away(dit, ddim):
    exe = compile_actions(dit, ddim, 2, {"transformer_blocks.0.ff": "CR"})
    gone = modules_of(graph_of(exe, 0)) - modules_of(graph_of(exe, 1))
    assert gone == {f"{BLOCKS[0]}.{name}" for name in ("norm3", "ff.net.0.proj", "ff.net.1", "ff.net.2")}
    gone = modules_of(graph_of(compile_actions(dit, ddim, 2, {"transformer_blocks.1.attn1": "CR"}), 1))
    assert not any(name.startswith(f"{BLOCKS[1]}.attn1") or name == f"{BLOCKS[1]}.norm1.norm" for name in gone)


# -- passes --------------------------------------------------------------------------------------------------------------

# (row, sites stored) -> rewrites of reuse_site, store_site, erase_markers (the sites that are not reused).
COUNTS = [
    ("CCCCCCCCC", (), (0, 0, 9)),
    ("CCCCCCCCC", (0, 1, 6, 7, 8), (0, 5, 9)),
    ("RRCRRCCCC", (), (4, 0, 5)),
    (".......RC", (8,), (1, 1, 8)),
    ("........R", (), (1, 0, 8)),
    ("......RCC", (7,), (1, 1, 8)),
    ("..RRCCCCC", (4, 7), (2, 2, 7)),
]


@pytest.mark.parametrize(("row", "stores", "counts"), COUNTS)
def test_rewrite_counts(dit, row, stores, counts):
    marked = marked_graph(dit, inputs())
    reads = tuple(Read(i, VALUE, 1) for i, letter in enumerate(row) if letter == "R")
    context = PassContext(marked.sites, row, reads, tuple((i, VALUE) for i in stores), written_storages(marked.graph))
    gm = bound_copy(marked, dit)
    found = {}
    exact = [rewrite for rewrite in ROW_PASSES if is_wanted(rewrite, CompileConfig("eager", exact=True))]
    for rewrite in exact:
        before = len(gm.graph.nodes)
        found[rewrite.__name__] = rewrite(gm, context)
        gm.graph.lint()
        if rewrite.__name__ == "eliminate_dead_code":
            assert found[rewrite.__name__] == before - len(gm.graph.nodes)
            # A second time there is nothing left to do.
            assert rewrite(gm, context) == 0
    assert (found["reuse_site"], found["store_site"], found["erase_markers"]) == counts
    assert found["add_slots"] == len(reads)
    assert found["lowrank_site"] == found["forecast_site"] == found["choose_references"] == 0
    assert (found["eliminate_dead_code"] > 0) == bool(reads) or row == "CCCCCCCCC"
    slots = [node.name for node in gm.graph.nodes if node.op == "placeholder" and node.name.startswith("slot_")]
    assert len(slots) == counts[0]
    assert len(output_of(gm.graph).args[0]) == 1 + counts[1]


@pytest.mark.parametrize(
    ("actions", "variants"),
    [
        ({}, 1),
        # Computing steps store; the last of them is read until the end.
        ({"attn": "CR" * 25, "ff": "CR" * 25}, 2),
        # 49 is computed, but nobody reads it any more.
        ({"ff": ("CRR" * 17)[:49] + "C"}, 3),
        ({"output": "CR" * 25}, 2),
        ({"attn": "CR" * 25, "ff": ("CRRR" * 13)[:50]}, 3),
    ],
)
def test_equal_rows_share_a_variant(dit, ddim, actions, variants):
    exe = compile_actions(dit, ddim, 50, actions)
    assert len(exe.default.variants) == variants
    by_variant = {}
    for step, variant in enumerate(exe.default.rows):
        key = (exe.plan.rows[step], [stored.site for stored in traffic(exe.plan)[step].stores])
        assert by_variant.setdefault(variant, key) == key


@pytest.mark.parametrize("every", [2, 3, 5, 7])
def test_an_interval_plan_of_50_steps_needs_few_variants(dit, ddim, every):
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=50, every=every)
    exe = sg.compile(dit, plan, inputs(), backend="eager", exact=True)
    assert len(exe.default.variants) <= 3
    assert len(exe.default.rows) == 50


# -- values --------------------------------------------------------------------------------------------------------------


def test_fed_stored_values_a_graph_is_exact(dit, ddim):
    """Values stored by the oracle for other inputs, fed to the graph by hand."""
    plan = sg.make_plan("manual", model=dit, scheduler=ddim, steps=2, actions={"transformer_blocks.1.attn1": "CR", "ff": "CR"})
    graphs = specialize(marked_graph(dit, inputs()), dit, plan)
    oracle = Oracle.of(dit, plan)
    oracle(**inputs(seed=3, timestep=900))
    slots = [oracle.stored[0][plan.sites[i].name] for i, _, _ in traffic(plan)[1].reads]
    given = inputs(seed=4, timestep=100)
    with torch.no_grad():
        got = graphs.graphs[graphs.rows[1]](*given.values(), *slots)[0]
    assert torch.equal(got, oracle(**given).sample)


@pytest.mark.parametrize("kind", ["hidden", "output", "block", "stack_residual", "attn"])
def test_results_and_inputs_may_be_overwritten_by_the_caller(dit, ddim, kind):
    exe = compile_actions(dit, ddim, 3, {kind: "CRR"})
    oracle, session = Oracle.of(dit, exe.plan), exe.session()
    for seed in range(3):
        given = inputs(seed=seed)
        wanted = oracle(**given).sample
        got = session(**given).sample
        assert torch.equal(got, wanted)
        got.fill_(float("nan"))
        for value in given.values():
            value.zero_()


def test_two_sites_of_one_tensor_are_stored_apart(dit, ddim):
    """The last block's value and `hidden` are the same tensor when both are computed."""
    exe = compile_actions(dit, ddim, 4, {"transformer_blocks.1": "CCRC", "hidden": "CRCC"})
    session = exe.session()
    session(**inputs())
    table = session._state.branches[0].slots
    (first,), (second,) = (table.read(slot) for slot in exe.default.slots.steps[0].stores)
    assert torch.equal(first, second)
    assert abs(first.data_ptr() - second.data_ptr()) >= first.nbytes
    assert session.slot_bytes == first.nbytes + second.nbytes == exe.memory().peak_slot_bytes


def test_a_run_keeps_no_value_of_another(dit, ddim):
    exe = compile_actions(dit, ddim, 3, {"ff": "CRR"})
    wanted = run_loop(Oracle.of(dit, exe.plan), ddim, noise(), 3, 1.0, labels(5))[0]
    one, two = exe.session(), exe.session()
    two(**inputs(seed=8))
    assert torch.equal(run_loop(one, ddim, noise(), 3, 1.0, labels(5))[0], wanted)
    one.reset()
    assert torch.equal(run_loop(one, ddim, noise(), 3, 1.0, labels(5))[0], wanted)


# -- costs ---------------------------------------------------------------------------------------------------------------


def dit_macs(config, batch: int) -> dict[str, int]:
    """Multiply-accumulates of a DiT's parts, from its configuration alone."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = (config["sample_size"] // config["patch_size"]) ** 2
    patch = config["patch_size"] ** 2
    embedder = 256 * width + width * width
    parts = {
        "patch": tokens * width * config["in_channels"] * patch,
        "attn": 4 * tokens * width * width + 2 * tokens * tokens * width,
        "ff": 2 * tokens * width * 4 * width,
        "gates": embedder + width * 6 * width,
        "head": embedder + width * 2 * width + tokens * width * config["out_channels"] * patch,
    }
    return {name: batch * macs for name, macs in parts.items()}


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_the_formula(dit, batch):
    part, depth = dit_macs(dit.config, batch), dit.config["num_layers"]
    block = part["attn"] + part["ff"] + part["gates"]
    whole = part["patch"] + depth * block + part["head"]
    steps = {
        "CCRC": {"attn": "CCRC"}, "CRCC": {"ff": "CRCC"}, "CCCR": {"hidden": "CCCR"},
    }  # fmt: skip
    actions = {name: letters for entry in steps.values() for name, letters in entry.items()}
    macs = compile_actions(dit, tiny_scheduler("ddim"), 4, actions, batch).macs()
    assert macs.per_step == (whole, whole - depth * part["ff"], whole - depth * part["attn"], part["head"])
    assert macs.total == 4 * whole
    residual = compile_actions(dit, tiny_scheduler("ddim"), 2, {"stack_residual": "CR"}, batch).macs()
    assert residual.per_step == (whole, whole - depth * block)
    output = compile_actions(dit, tiny_scheduler("ddim"), 2, {"output": "CR"}, batch, guidance="separate").macs()
    assert output.per_step == (2 * whole, 0)


def test_macs_of_the_published_model():
    from stepgraph.compiler.models.dit import XL_2

    part = dit_macs({**XL_2, "sample_size": 32}, 1)
    total = part["patch"] + 28 * (part["attn"] + part["ff"] + part["gates"]) + part["head"]
    assert total == 118_666_838_016
