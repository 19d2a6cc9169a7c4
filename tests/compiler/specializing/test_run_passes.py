"""The runner of all passes: which run, in which order, under which numbers, timed and checked, whatever they rewrite."""

import logging

import pytest
import torch
from torch import fx

import stepgraph as sg
from helpers.distance import SAME_RUN, error
from helpers.families import FLUX, flux_inputs, flux_plan
from helpers.tiny import inputs, labels, noise, tiny_scheduler
from stepgraph.compiler.specializing import passes as order
from stepgraph.compiler.specializing import specialize as specialize_file
from stepgraph.compiler.specializing.passes import INEXACT, MODEL_PASSES, NEEDED, PROGRAM_PASSES, ROW_PASSES, is_wanted
from stepgraph.config import CompileConfig
from stepgraph.node_facts import output_of

ALL = (*MODEL_PASSES, *ROW_PASSES, *PROGRAM_PASSES)
EXACT, EAGER = CompileConfig("eager", exact=True), CompileConfig("eager")


def plan_of(model, **arguments):
    return sg.make_plan("interval", model=model, scheduler=tiny_scheduler("ddim"), steps=4, every=2, **arguments)


def test_exact_is_the_runners_question():
    assert not [rewrite.__name__ for rewrite in INEXACT if is_wanted(rewrite, EXACT)]
    assert {rewrite.__name__ for rewrite in ALL if not is_wanted(rewrite, EAGER)} == {"choose_references", "merge_projections"}
    assert is_wanted(order.merge_projections, CompileConfig())
    assert not is_wanted(order.merge_projections, CompileConfig(merge=False))
    assert not is_wanted(order.merge_projections, CompileConfig(prepack=False))
    assert not is_wanted(order.hoist_conditioning, CompileConfig(hoist=False))


def test_every_pass_is_logged_with_its_rewrites(dit, caplog, monkeypatch):
    monkeypatch.setenv("STEPGRAPH_LOG", "debug")
    with caplog.at_level(logging.DEBUG, logger="stepgraph.passes"):
        sg.compile(dit, plan_of(dit), inputs(2), backend="eager")
    said = {record.args[1]: record.args[2] for record in caplog.records if record.name == "stepgraph.passes"}
    assert set(said) == {rewrite.__name__ for rewrite in ALL if is_wanted(rewrite, EAGER)}
    assert said["hoist_conditioning"] > 0


@pytest.mark.parametrize("rewrite", [rewrite for rewrite in ALL if rewrite not in NEEDED], ids=lambda rewrite: rewrite.__name__)
def test_every_optional_pass_can_be_left_out(dit, ddim, rewrite, monkeypatch):
    wanted = sg.sample(sg.compile(dit, plan_of(dit), inputs(2), backend="eager"), ddim, noise(2), **labels(1, 2))
    monkeypatch.setenv("STEPGRAPH_DISABLE_PASS", rewrite.__name__)
    exe = sg.compile(dit, plan_of(dit), inputs(2), backend="eager")
    assert (exe.default.hoisted is None) == (rewrite is order.hoist_conditioning)
    images = sg.sample(exe, ddim, noise(2), **labels(1, 2))
    assert error(images, wanted) < SAME_RUN


def broken_model_pass(gm: fx.GraphModule, ctx) -> int:
    """Scales the model's result."""
    output = output_of(gm.graph)
    with gm.graph.inserting_before(output):
        scaled = gm.graph.call_function(torch.mul, (output.args[0][0], 1.01))
    scaled.meta |= {"val": output.args[0][0].meta["val"]}
    output.args = ((scaled, *output.args[0][1:]),)
    return 1


def broken_program_pass(program, ctx) -> int:
    """Scales what is stored, which shows in the steps that read it."""
    (gm,) = [gm for gm, context in zip(program.graphs, program.contexts, strict=True) if context.stores]
    output = output_of(gm.graph)
    stored = output.args[0][-1]
    with gm.graph.inserting_before(output):
        scaled = gm.graph.call_function(torch.mul, (stored, 1.01))
    scaled.meta |= {"val": stored.meta["val"]}
    output.args = ((*output.args[0][:-1], scaled),)
    return 1


@pytest.mark.parametrize(
    ("literal", "broken", "said"),
    [
        ("MODEL_PASSES", broken_model_pass, "pass broken_model_pass changed output 0"),
        ("PROGRAM_PASSES", broken_program_pass, r"pass broken_program_pass \(step 1\) changed output 0"),
    ],
)
def test_checks_find_broken_passes_over_models_and_programs(dit, monkeypatch, literal, broken, said):
    monkeypatch.setattr(specialize_file, literal, (*getattr(order, literal), broken))
    sg.compile(dit, plan_of(dit), inputs(2), backend="eager")
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    with pytest.raises(sg.CompileError, match=said):
        sg.compile(dit, plan_of(dit), inputs(2), backend="eager")


def test_sound_programs_pass_their_checks(dit, monkeypatch):
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    plan = sg.forecast(plan_of(dit), "taylor", order=1)
    exe = sg.compile(dit, plan, inputs(2), backend="eager")
    assert exe.default.hoisted is not None


def broken_program_pass(program, ctx) -> int:
    """Moves the first of the operations before the loop behind the last."""
    first, *_, last = [
        node for node in program.conditioning["timestep"].graph.nodes if node.op not in ("placeholder", "output")
    ]
    last.append(first)
    return 1


def test_what_a_pass_makes_is_dumped_and_linted_with_it(dit, monkeypatch, tmp_path):
    monkeypatch.setenv("STEPGRAPH_DUMP", str(tmp_path))
    sg.compile(dit, plan_of(dit), inputs(2), backend="eager")
    files = {label: next(tmp_path.glob(f"{label}-*-hoist_conditioning.py")) for label in ("prompt", "timestep", "variant000")}
    assert len({path.name.split("-")[1] for path in files.values()}) == 1
    assert not list(tmp_path.glob("prompt-*-fold_sums.py"))
    assert "timestep_embedder" in files["timestep"].read_text()
    assert "timestep_embedder" not in files["variant000"].read_text()
    # Linted by the runner, too: a graph that uses a node before it is made is refused.
    monkeypatch.setattr(specialize_file, "PROGRAM_PASSES", (*PROGRAM_PASSES, broken_program_pass))
    with pytest.raises(RuntimeError, match="before it has been defined"):
        sg.compile(dit, plan_of(dit), inputs(2), backend="eager")


def test_split_projections_is_dumped_under_its_number_and_checked(monkeypatch, tmp_path):
    import diffusers

    torch.manual_seed(0)
    model, flow = diffusers.FluxTransformer2DModel(**FLUX).eval(), diffusers.FlowMatchEulerDiscreteScheduler()
    monkeypatch.setenv("STEPGRAPH_DUMP", str(tmp_path))
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    plan = flux_plan(model, flow, {"single_transformer_blocks.0.attn": "CRCR"})
    sg.compile(model, plan, flux_inputs(1), backend="eager")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model-00-traced.py", "model-01-split_projections.py"} <= names
    assert "torch._C._nn.linear" in (tmp_path / "model-01-split_projections.py").read_text()
    hoist = 1 + ALL.index(order.hoist_conditioning)
    assert f"variant000-{hoist:02d}-hoist_conditioning.py" in names
