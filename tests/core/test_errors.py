"""The errors: whose child each is, and that a real refusal of its kind raises each."""

import pytest
import torch

import stepgraph as sg
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph import errors
from stepgraph.ops import OPS
from stepgraph.runtime.capture.cudagraph import refuse_difference

PARENTS = {
    "StepgraphError": (Exception,),
    "PlanError": (errors.StepgraphError, ValueError),
    "ArgumentError": (errors.PlanError,),
    "MismatchError": (errors.PlanError,),
    "FileFormatError": (errors.PlanError,),
    "TraceError": (errors.StepgraphError, RuntimeError),
    "CompileError": (errors.StepgraphError, RuntimeError),
    "OpError": (errors.CompileError,),
    "CaptureError": (errors.CompileError,),
}


def test_whose_child_each_is():
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert {name: value.__bases__ for name, value in classes.items()} == PARENTS
    assert sg.StepgraphError is errors.StepgraphError


@pytest.fixture(scope="module")
def full():
    return sg.make_plan("full", model=tiny_dit(), scheduler=tiny_scheduler("ddim"), steps=2)


def of_another_site(plan, folder):
    plan.index("nose")


def unknown_policy(plan, folder):
    sg.make_plan("nose", model=tiny_dit(), scheduler=tiny_scheduler("ddim"), steps=2)


def steps_that_are_none(plan, folder):
    plan.resample(0)


def another_model(plan, folder):
    sg.compile(tiny_dit(num_layers=1), plan, inputs(), backend="eager")


def another_schedule(plan, folder):
    plan.resample(4, tiny_scheduler("euler"))


def a_cut_plan(plan, folder):
    (folder / "plan.json").write_text(plan.to_json()[:-20])
    sg.CachePlan.load(folder / "plan.json")


def cut_factors(plan, folder):
    (folder / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    sg.Factors.load(folder / "cut.safetensors")


def no_zip(plan, folder):
    (folder / "cut.zip").write_bytes(b"PK\x03\x04")
    sg.load(folder / "cut.zip")


def a_model_in_training(plan, folder):
    sg.make_plan("full", model=tiny_dit().train(), scheduler=tiny_scheduler("ddim"), steps=2)


def inputs_elsewhere(plan, folder):
    elsewhere = {name: value.to("meta") for name, value in inputs().items()}
    sg.compile(tiny_dit(), plan, elsewhere, backend="eager")


def a_second_provider(plan, folder):
    OPS["modulated_norm"].register("reference", lambda *_: None, lambda *_: None)


def a_replay_that_differs(plan, folder):
    refuse_difference(torch.ones(2), torch.zeros(2), "step")


REFUSALS = {
    of_another_site: errors.ArgumentError, unknown_policy: errors.ArgumentError, steps_that_are_none: errors.ArgumentError,
    another_model: errors.MismatchError, another_schedule: errors.MismatchError,
    a_cut_plan: errors.FileFormatError, cut_factors: errors.FileFormatError, no_zip: errors.FileFormatError,
    a_model_in_training: errors.TraceError, inputs_elsewhere: errors.CompileError,
    a_second_provider: errors.OpError, a_replay_that_differs: errors.CaptureError,
}  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.__name__)
def test_what_is_refused_as_what(full, tmp_path, refusal):
    with pytest.raises(errors.StepgraphError) as caught:
        refusal(full, tmp_path)
    assert caught.type is REFUSALS[refusal]


def test_a_plan_that_is_not_valid(full):
    with pytest.raises(errors.PlanError, match="listed more than once") as caught:
        sg.CachePlan(full.header, (*full.sites, full.sites[0]), tuple(row + "C" for row in full.rows))
    assert caught.type is errors.PlanError
