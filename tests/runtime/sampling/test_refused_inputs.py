"""What no run can begin with is refused before its first step, or by its first call, and not by a scheduler or a lookup."""

import pytest
import torch

import stepgraph as sg
from helpers.pipes import tiny_pipe
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.errors import ArgumentError, MismatchError, PlanError
from stepgraph.runtime.session.row_numbers import RowNumbers


@pytest.fixture(scope="module")
def executable():
    model = tiny_dit()
    plan = sg.make_plan("full", model=model, scheduler=tiny_scheduler("ddim"), steps=2)
    return sg.compile(model, plan, inputs(1), backend="eager")


NOISE = {
    "noise is a float32 tensor []; expected latents": torch.tensor(1.0),
    "noise is a float32 tensor [4]; expected latents": torch.ones(4),
    "noise is a int64 tensor [1, 4, 8, 8]; expected latents": noise(1).long(),
    "laid out as sparse_coo; expected a dense one: pass noise.to_dense()": noise(1).to_sparse(),
    "makes [1, 4, 6, 6] of latents [1, 4, 7, 7]": torch.randn(1, 4, 7, 7),
}


@pytest.mark.parametrize("said", NOISE)
@pytest.mark.parametrize("compiled", [True, False])
def test_noise(executable, said, compiled):
    runner, steps = (executable, None) if compiled else (executable.model, 2)
    with pytest.raises((ArgumentError, MismatchError)) as refused:
        sg.sample(runner, tiny_scheduler("ddim"), NOISE[said], steps=steps, **labels(3))
    assert said in str(refused.value)


@pytest.mark.parametrize("label", [-1, NULL_CLASS + 1])
def test_class_labels_without_a_row(executable, label):
    said = f"class_labels holds {label}; expected whole numbers in 0..{NULL_CLASS}"
    with pytest.raises(ArgumentError, match=said):
        sg.sample(executable, tiny_scheduler("ddim"), noise(1), **labels(label))
    with pytest.raises(ArgumentError, match=said):
        executable.session()(**inputs(1) | labels(label))
    # The last row is one.
    executable.session()(**inputs(1) | labels(NULL_CLASS))


def test_class_labels_elsewhere_are_read_at_the_end(monkeypatch):
    monkeypatch.setattr("stepgraph.runtime.session.row_numbers.waits", lambda device: True)
    for wrong in (-1, 7):
        numbers = RowNumbers()
        for given in (torch.tensor([0, 6]), torch.tensor([3, wrong]), torch.tensor([1, 2])):
            numbers.look({"class_labels": 7}, {"class_labels": given})
        with pytest.raises(ArgumentError, match=r"outside these .*; expected whole numbers in 0\.\.6"):
            numbers.finish()


def test_sparse_conditioning(executable):
    given = {"class_labels": torch.tensor([3]).to_sparse()}
    for call in (
        lambda: sg.sample(executable, tiny_scheduler("ddim"), noise(1), **given),
        lambda: executable.session()(**inputs(1) | given),
        lambda: sg.compile(executable.model, executable.plan, inputs(1) | given, backend="eager"),
    ):
        with pytest.raises(PlanError, match=r"class_labels is .* laid out as sparse_coo"):
            call()


@pytest.fixture
def attached(executable):
    pipe = tiny_pipe(executable.model)
    pipe.scheduler.set_timesteps(2)
    executable.attach(pipe)
    yield pipe.transformer
    executable.detach()


def test_calls_with_other_arguments_are_the_models_own_type_error(executable, attached):
    wrong = ({}, inputs(1) | {"nose": 1})
    said = []
    for call in wrong:
        with pytest.raises(TypeError) as refused:
            attached(**call)
        said.append(str(refused.value))
    for call, ours in zip(wrong, said, strict=True):
        with pytest.raises(TypeError) as eager:
            type(attached).forward(attached, **call)
        name = "'hidden_states'" if not call else "'nose'"
        assert name in str(eager.value)
        assert name in ours
        assert str(eager.value).split(" ")[:2] == ours.split(" ")[:2]


def test_complex_timesteps(executable, attached):
    given = inputs(1) | {"timestep": torch.tensor([500 + 0j])}
    for call in (
        attached,
        executable.session(),
        lambda **given: sg.compile(executable.model, executable.plan, given, backend="eager"),
    ):
        with pytest.raises(ArgumentError, match=r"timestep is a complex64 tensor .*; expected real numbers"):
            call(**given)
