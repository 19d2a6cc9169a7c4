"""Environment variables: checked, and each does what it says."""

import logging
from pathlib import Path

import pytest
import torch
from torch import fx

import stepgraph as sg
from helpers.tiny import inputs, labels, noise, tiny_dit
from stepgraph.compiler.specializing import specialize as specialize_module
from stepgraph.compiler.specializing.passes import PROGRAM_PASSES, ROW_PASSES, is_wanted
from stepgraph.env import VARIABLES, get_logger, read_env
from stepgraph.errors import PlanError
from stepgraph.node_facts import output_of


@pytest.fixture
def plan(dit, ddim):
    return sg.make_plan("manual", model=dit, scheduler=ddim, steps=3, actions={"ff": "CRC", "hidden": "CCR"})


def build(model, plan, **options) -> sg.Executable:
    return sg.compile(model, plan, inputs(), backend="eager", exact=True, **options)


def test_defaults(monkeypatch):
    monkeypatch.delenv("STEPGRAPH_CACHE")
    monkeypatch.delenv("STEPGRAPH_REGIONS")
    env = read_env()
    assert env.regions_mb == 512
    assert env.cache == Path.home() / ".cache" / "stepgraph"
    assert (env.dump, env.disabled_passes, env.log, env.check) == (None, frozenset(), "warning", False)
    assert all(meaning for meaning in VARIABLES.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("STEPGRAPH_NOSE", "1", "unknown environment variable STEPGRAPH_NOSE; known: STEPGRAPH_DUMP"),
        ("STEPGRAPH_CHECK", "yes", "STEPGRAPH_CHECK is 'yes'; expected 0 or 1"),
        ("STEPGRAPH_REGIONS", "-1", "STEPGRAPH_REGIONS is '-1'; expected megabytes, 0 or more"),
        ("STEPGRAPH_LOG", "loud", "STEPGRAPH_LOG is 'loud'; expected debug, info, warning or error"),
    ],
)
def test_bad_settings_are_refused(monkeypatch, dit, plan, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        read_env()
    with pytest.raises(ValueError, match=message):
        build(dit, plan)


def test_log_level(monkeypatch, dit, plan, caplog):
    monkeypatch.setenv("STEPGRAPH_LOG", "debug")
    with caplog.at_level(logging.DEBUG, logger="stepgraph"):
        build(dit, plan)
    assert any("reuse_site made 2 rewrites" in message for message in caplog.messages)
    assert any("3 variants for 3 steps" in message for message in caplog.messages)
    monkeypatch.setenv("STEPGRAPH_LOG", "error")
    assert get_logger("x").getEffectiveLevel() == logging.ERROR


# -- STEPGRAPH_CHECK -------------------------------------------------------------------------------------------------------


def test_check_passes_a_sound_plan(monkeypatch, dit, plan, ddim):
    wanted = sg.sample(build(dit, plan), ddim, noise(), **labels(1))
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    assert torch.equal(sg.sample(build(dit, plan), ddim, noise(), **labels(1)), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_names_bad_weights(monkeypatch, ddim, value):
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight[3, :2] = value
    plan = sg.make_plan("full", model=model, scheduler=ddim, steps=2)
    build(model, plan)
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    with pytest.raises(PlanError, match=r"weights of DiT.*transformer_blocks\.1\.ff\.net\.2\.weight has 2 of 4096 values"):
        build(model, plan)


def test_check_names_bad_latents(monkeypatch, dit, plan):
    exe = build(dit, plan)
    bad = inputs()
    bad["hidden_states"][0, 0, 0, :3] = float("nan")
    assert not torch.isfinite(exe.session()(**bad).sample).all()
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    session = exe.session()
    session(**inputs())
    with pytest.raises(PlanError, match="input of step 1: hidden_states has 3 of 256 values that are NaN or infinite"):
        session(**bad)
    assert (session.step, session.slot_bytes) == (0, 0)


def break_arithmetic(gm: fx.GraphModule, ctx) -> int:
    """A pass that makes one number wrong."""
    node = next(node for node in gm.graph.nodes if node.target == "mul" and isinstance(node.args[1], float))
    node.args = (node.args[0], node.args[1] * 1.01)
    return 1


def break_shape(gm: fx.GraphModule, ctx) -> int:
    """A pass that returns another shape."""
    output = output_of(gm.graph)
    with gm.graph.inserting_before(output):
        short = gm.graph.call_method("flatten", (output.args[0][0],))
    output.args = ((short, *output.args[0][1:]),)
    return 1


@pytest.mark.parametrize("broken", [break_arithmetic, break_shape], ids=lambda f: f.__name__)
def test_check_catches_a_broken_pass(monkeypatch, dit, plan, broken):
    at = [rewrite.__name__ for rewrite in ROW_PASSES].index("reuse_site") + 1
    monkeypatch.setattr(specialize_module, "ROW_PASSES", (*ROW_PASSES[:at], broken, *ROW_PASSES[at:]))
    build(dit, plan)
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    with pytest.raises(sg.CompileError, match=f"pass {broken.__name__} changed output 0"):
        build(dit, plan)


# -- STEPGRAPH_DUMP and STEPGRAPH_DISABLE_PASS -------------------------------------------------------------------------------


def test_dump_writes_a_file_per_variant_and_pass(monkeypatch, dit, plan, tmp_path):
    monkeypatch.setenv("STEPGRAPH_DUMP", str(tmp_path / "deep" / "dumps"))
    exe = build(dit, plan)
    wanted = {"model-00-traced.py"}
    wanted |= {f"variant{variant:03d}-01-marked.py" for variant in range(len(exe.default.variants))}
    wanted |= {
        f"variant{variant:03d}-{number:02d}-{rewrite.__name__}.py"
        for variant in range(len(exe.default.variants))
        for number, rewrite in enumerate((*ROW_PASSES, *PROGRAM_PASSES), start=2)
        if is_wanted(rewrite, exe.config)
    }
    files = {path.name: path.read_text() for path in (tmp_path / "deep" / "dumps").iterdir()}
    hoisted = {name for name in files if name.startswith(("prompt-", "timestep-"))}
    assert {name.split("-", 2)[2] for name in hoisted} == {"hoist_conditioning.py"}
    assert set(files) - hoisted == wanted
    assert all("def forward(self, hidden_states" in files[name] for name in wanted)
    assert "site_value" in files["model-00-traced.py"]
    assert "site_value" in files["variant001-01-marked.py"]
    assert "slot_" not in files["variant001-01-marked.py"]
    assert "slot_transformer_blocks_0_ff" in files["variant001-02-add_slots.py"]
    assert "site_value" not in files[max(name for name in files if name.startswith("variant001"))]


@pytest.mark.parametrize("check", ["0", "1"])
def test_optional_passes_can_be_left_out(monkeypatch, dit, plan, ddim, check):
    whole = build(dit, plan, hoist=False)
    wanted = sg.sample(whole, ddim, noise(), **labels(1))
    monkeypatch.setenv("STEPGRAPH_DISABLE_PASS", " eliminate_dead_code, ")
    monkeypatch.setenv("STEPGRAPH_CHECK", check)
    exe = build(dit, plan, hoist=False)
    assert exe.macs().computed > whole.macs().computed
    assert len(exe.default.variants[1].graph.graph.nodes) > len(whole.default.variants[1].graph.graph.nodes)
    assert torch.equal(sg.sample(exe, ddim, noise(), **labels(1)), wanted)


@pytest.mark.parametrize("name", ["reuse_site", "store_site", "erase_markers", "nose"])
def test_other_passes_cannot_be_left_out(monkeypatch, dit, plan, name):
    monkeypatch.setenv("STEPGRAPH_DISABLE_PASS", f"eliminate_dead_code,{name}")
    with pytest.raises(sg.CompileError, match=f"STEPGRAPH_DISABLE_PASS names '{name}'; .*left out: eliminate_dead_code"):
        build(dit, plan)
