"""Plans: validation, JSON, files, and refusals where a plan does not fit."""

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import stepgraph as sg
from helpers.example_plans import HEADER, PLAN, SITES, build
from helpers.plans import random_rows
from helpers.tiny import inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.errors import PlanError
from stepgraph.plan import CachePlan, Site

FULL = "C" * len(SITES)


def with_row(row: str, step: int = 1) -> CachePlan:
    rows = [FULL, FULL, FULL]
    rows[step] = row
    return CachePlan(HEADER, SITES, tuple(rows))


TEXT = PLAN.to_json()


# -- making --------------------------------------------------------------------------------------------------------------


def test_build_writes_the_canonical_form():
    assert PLAN.rows == ("CCCCCCCCC", "CRCCRCCCC", ".......RC")
    assert build({"block": "CRC"}).rows[1] == ".....RCCC"
    assert build({"blocks.0": "CRC", "attn": "CRR"}).rows == (FULL, "..RRCCCCC", "RCCRCCCCC")
    assert build({"blocks.0.ff": "CCC", "ff": "CRR"}).rows[1] == "CCCCRCCCC"
    assert [site.name for site in SITES][3:5] == ["blocks.1.attn#1", "blocks.1.ff:1"]
    assert PLAN.action(1, "blocks.1.ff:1") is sg.Action.REUSE
    assert PLAN.action(2, "blocks.0") is sg.Action.DEAD


INVALID = {
    "unknown site": (lambda: build({"blocks.7": "CCC"}), r"unknown site or kind 'blocks.7'; this model has .*blocks.0"),
    "unknown kind": (lambda: build({"mlp": "CCC"}), r"unknown site or kind 'mlp'"),
    "unknown site asked for": (lambda: PLAN.action(0, "nose"), r"unknown site 'nose'; the sites are blocks.0.attn"),
    "kind that is none": (lambda: Site("x", "nose"), r"site 'x' has kind 'nose'; the kinds are attn"),
    "too few actions": (lambda: build({"ff": "CR"}), r"'ff' has 2 actions for 3 steps"),
    "wrong T": (lambda: CachePlan(HEADER, SITES, (FULL,) * 4), r"the plan has 4 rows for the 3 timesteps"),
    "nothing stored": (lambda: with_row("RCCCCCCCC", 0), r"step 0, site blocks.0.attn: REUSE before any COMPUTE"),
    "stored too late": (lambda: build({"hidden": "RCC"}), r"step 0, site hidden: REUSE before any COMPUTE"),
    "L on hidden": (
        lambda: build({"hidden": "CLC"}),
        r"step 1, site hidden: action 'L' is not possible for kind hidden.*C \(COMPUTE\)",
    ),
    "no action at all": (lambda: build({"ff": "CXC"}), r"step 1, site blocks.0.ff: action 'X' is not possible"),
    "DEAD uncovered": (lambda: with_row(".CCCCCCCC"), r"step 1, site blocks.0.attn: DEAD, but no reused site contains it"),
    "DEAD behind": (lambda: with_row(".......R."), r"step 1, site output: DEAD, but no reused site"),
    "live inside reused": (lambda: with_row("C......RC"), r"step 1, site blocks.0.attn: COMPUTE inside the reused site hidden"),
    "reused inside reused": (lambda: with_row(".....R.RC"), r"step 1, site blocks.1: REUSE inside the reused site hidden"),
    "duplicate site": (
        lambda: CachePlan(HEADER, (*SITES, SITES[0]), (FULL + "C",) * 3),
        r"site blocks.0.attn is listed more than once",
    ),
    "wrong row length": (lambda: with_row(FULL + "C"), r"step 1 has 10 actions for 9 sites"),
    "no timesteps": (lambda: replace(HEADER, timesteps=()), r"at least one timestep"),
    "NaN timestep": (lambda: replace(HEADER, timesteps=(1, float("nan"))), r"timesteps must be finite"),
    "no sites": (lambda: CachePlan(HEADER, (), ("",) * 3), r"at least one site"),
    "no steps": (lambda: replace(HEADER, steps=0), r"steps is 0; expected a whole number of at least 1"),
    "steps as truth": (lambda: replace(HEADER, steps=True), r"steps is True"),
    "negative macs": (lambda: replace(HEADER, macs=-5), r"macs is -5; expected a whole number of at least 0"),
    "huge macs": (lambda: replace(HEADER, macs=10**400), "macs is a number of about 400 digits; expected a whole number"),
    "empty shape": (lambda: replace(HEADER, shapes={"x": (0,)}), r"a size in the input shapes .* is 0"),
    "dtype": (lambda: replace(HEADER, dtype="banana"), r"dtype is 'banana'; expected one of float64, float32"),
    "no model": (lambda: replace(HEADER, model=""), r"the header's model is empty"),
    "negative samples": (lambda: replace(HEADER, samples=-3), r"samples is -3"),
    "negative bytes": (lambda: Site("x", "ff", bytes=-1), r"site 'x': bytes is -1"),
    "negative call": (lambda: Site("x", "ff", call=-1), r"site 'x': call is -1"),
    "actions that are none": (lambda: build({"ff": 5}), r"actions\['ff'\] is 5; expected a text, or a list"),
    "equal branches": (
        lambda: replace(HEADER, guidance="separate", branches=("cond", "cond")),
        r"guidance 'separate' has the branches \['cond', 'uncond'\]; got \['cond', 'cond'\]",
    ),
    "guidance": (lambda: replace(HEADER, guidance="both"), r"guidance is 'both'; expected one of batched, separate, none"),
    "branches": (
        lambda: replace(HEADER, guidance="separate"),
        r"guidance 'separate' has the branches \['cond', 'uncond'\]; got \['all'\]",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_plans_are_refused(case):
    make, message = INVALID[case]
    with pytest.raises(PlanError, match=message):
        make()


# -- JSON ----------------------------------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path, dit):
    assert CachePlan.from_json(TEXT) == PLAN
    assert CachePlan.from_json(TEXT).to_json() == TEXT
    real = sg.make_plan("interval", model=dit, scheduler=tiny_scheduler("heun"), steps=4, every=3, guidance="separate")
    real.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == real
    assert len(TEXT.splitlines()) == 4 + len(asdict(HEADER)) + 2 + len(SITES)


@given(rows=random_rows(SITES, 3))
def test_random_plans_round_trip(rows):
    plan = CachePlan(HEADER, SITES, rows)
    assert CachePlan.from_json(plan.to_json()) == plan


def test_actions_can_be_given_as_the_enumeration():
    letters = [sg.Action.COMPUTE, sg.Action.REUSE, sg.Action.COMPUTE]
    assert build({"ff": letters}) == build({"ff": "CRC"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace('"version": 1', '"version": true'), "plan format version True"),
        (TEXT.replace('"macs"', '"macs": 1, "macs"', 1), "the key 'macs' appears more than once"),
    ],
)
def test_json_that_says_two_things_or_half_a_thing_is_refused(text, message):
    assert text != TEXT
    with pytest.raises(PlanError, match=message):
        CachePlan.from_json(text)


def test_a_folder_is_no_plan_file(tmp_path):
    with pytest.raises(PlanError, match="is a folder; expected a plan file"):
        CachePlan.load(tmp_path)


def test_every_truncation_is_refused():
    # What follows the last brace is only a line end.
    for length in range(len(TEXT.rstrip())):
        with pytest.raises(PlanError):
            CachePlan.from_json(TEXT[:length])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=5
)
HEADER_KEYS = st.sampled_from([*asdict(HEADER), "format", "version", "sites"])


@given(key=HEADER_KEYS, value=VALUES)
@example(key="timesteps", value=[10**400, 1, 1])
@example(key="shapes", value={"x": [[1]]})
@example(key="shapes", value={"x": None})
@example(key="branches", value=[["all"]])
def test_odd_header_values_give_a_plan_or_a_plan_error(key, value):
    data = json.loads(TEXT)
    data[key] = value
    try:
        plan = CachePlan.from_json(json.dumps(data))
    except PlanError:
        return
    assert plan == CachePlan.from_json(plan.to_json())


@given(key=st.sampled_from([*asdict(SITES[0]), "actions"]), value=VALUES, site=st.integers(0, len(SITES) - 1))
def test_odd_site_values_give_a_plan_or_a_plan_error(key, value, site):
    data = json.loads(TEXT)
    data["sites"][site][key] = value
    try:
        plan = CachePlan.from_json(json.dumps(data))
    except PlanError:
        return
    assert plan.rows == PLAN.rows


def edited(**changes) -> str:
    return json.dumps(json.loads(TEXT) | changes)


BAD_JSON = {
    "empty": ("", "not a complete JSON document"),
    "a list": ("[]", 'not a plan: expected an object with "format"'),
    "another format": (edited(format="book"), "not a plan"),
    "another version": (edited(version=2), "plan format version 2; this release reads version 1"),
    "no version": (edited(version=None), "plan format version None"),
    "unknown key": (edited(colour="red"), "header has the unknown key 'colour'; the keys are model, fingerprint"),
    "unknown site key": (edited(sites=[{"path": "a", "kind": "ff", "nose": 1}]), "site 0 has the unknown key 'nose'"),
    "incomplete site": (edited(sites=[{"path": "a", "actions": "CCC"}]), "site 0 is incomplete"),
    "site that is none": (edited(sites=["a"]), "site 0 is str; expected an object"),
    "no sites": (edited(sites=None), 'the plan has no list "sites"'),
    "short actions": (
        edited(sites=[{"path": "a", "kind": "ff", "actions": "CC"}]),
        "site a has 2 actions; expected a string of 3",
    ),
    "no actions": (edited(sites=[{"path": "a", "kind": "ff"}]), "site a has actions None"),
    "wrong type": (edited(macs="many"), "header: macs is 'many', which is not of the type"),
    "wrong member": (edited(timesteps=[1, "2", 3]), "header: timesteps is"),
    "wrong shapes": (edited(shapes=[1]), "header: shapes is"),
    "shape of text": (edited(shapes={"x": ["a"]}), r"shapes\['x'\]\[0\] is 'a'; expected a whole number"),
    "NaN": (edited(timesteps=[1, float("nan"), 2]), "the timesteps must be finite numbers"),
    "infinity": (edited(timesteps=[1, float("inf"), 2]), "the timesteps must be finite numbers"),
    "nesting": ("[" * 100_000, "not a complete JSON document"),
    "nested object": ('{"a":' * 100_000 + "1" + "}" * 100_000, "not a complete JSON document"),
    "huge number": (TEXT.replace('"macs": 100', '"macs": ' + "1" * 5000), "not a complete JSON document"),
    "huge timestep": (TEXT.replace("500.5", "1" * 400), "timesteps"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_refused(case, tmp_path):
    text, message = BAD_JSON[case]
    with pytest.raises(PlanError, match=message):
        CachePlan.from_json(text)
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(PlanError, match=r"bad\.json"):
        CachePlan.load(tmp_path / "bad.json")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(PlanError, match=r"bad\.json"):
        CachePlan.load(tmp_path / "bad.json")


# -- files ---------------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    write = Path.write_text

    def half(self, text, **kwargs):
        write(self, text[: len(text) // 2], **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        build({}).save(path)
    assert CachePlan.load(path) == PLAN
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        PLAN.save(tmp_path / "missing" / "plan.json")
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        # The superuser may write anywhere, so the refusal is simulated.
        def refuse(self, *args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(PermissionError):
        PLAN.save(folder / "plan.json")
    assert [path.name for path in folder.iterdir()] == []


# -- plans that do not fit -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit_plan(dit):
    return sg.make_plan("interval", model=dit, scheduler=tiny_scheduler("ddim"), steps=4)


class Other(torch.nn.Linear):
    """Another class of model."""


def compile_for(model, plan, given=None):
    return sg.compile(model, plan, given or inputs(), backend="eager", exact=True)


WIDE = {**inputs(), "hidden_states": torch.zeros(1, 4, 12, 12)}
MISFITS = {
    "class": (lambda: Other(2, 2).eval(), None, "the plan is for DiTTransformer2DModel; this model is Other"),
    "structure": (
        lambda: tiny_dit(num_layers=3),
        None,
        "the plan is for another DiTTransformer2DModel: its configuration or parameter",
    ),
    "dtype": (lambda: tiny_dit().bfloat16(), None, "the plan is for a float32 model; this one is bfloat16"),
    "resolution": (
        tiny_dit,
        WIDE,
        r"hidden_states of shape \[batch, 4, 8, 8\]; given is \[batch, 4, 12, 12\]; .*this resolution",
    ),
    "missing input": (
        tiny_dit,
        {"hidden_states": noise()},
        "the plan is for the tensor inputs hidden_states, timestep, class_labels",
    ),
    "input dtype": (
        tiny_dit,
        {**inputs(), "hidden_states": noise().double()},
        "the plan is for float32; hidden_states is float64",
    ),
    "batch sizes": (tiny_dit, {**inputs(), **labels(1, 2)}, "the inputs disagree on the batch size"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_plan_for_something_else_is_refused(case, dit_plan):
    make, given_inputs, message = MISFITS[case]
    # One that rests on no measurement follows other sizes.
    plan = dit_plan.with_header(measured="choice")
    with pytest.raises(PlanError, match=message):
        compile_for(make(), plan, given_inputs)


def test_a_plan_with_other_sites_is_refused(dit, dit_plan):
    fewer = CachePlan(dit_plan.header, dit_plan.sites[1:], tuple(row[1:] for row in dit_plan.rows))
    renamed = CachePlan(dit_plan.header, (Site("nose", "attn"), *dit_plan.sites[1:]), dit_plan.rows)
    moved = CachePlan(dit_plan.header, (dit_plan.sites[1], dit_plan.sites[0], *dit_plan.sites[2:]), dit_plan.rows)
    for plan, message in ((fewer, r"attn1"), (renamed, "nose"), (moved, "another order")):
        with pytest.raises(PlanError, match=message):
            compile_for(dit, plan)


SCHEDULES = {
    "class": (tiny_scheduler("euler"), None, "compiled for DDIMScheduler, but .* has EulerDiscreteScheduler"),
    "config": (type(tiny_scheduler("ddim"))(beta_end=0.03), None, "compiled for another configuration of DDIMScheduler"),
    "steps": (tiny_scheduler("ddim"), 7, "compiled for 4 inference steps, asked for 7"),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_another_schedule_is_refused(case, dit, dit_plan):
    scheduler, steps, message = SCHEDULES[case]
    # One that rests on no measurement follows another configuration.
    dit_plan = dit_plan.with_header(measured="choice")
    with pytest.raises(PlanError, match=message):
        sg.sample(compile_for(dit, dit_plan), scheduler, noise(), steps=steps, **labels(1))
