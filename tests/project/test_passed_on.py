"""Errors that are not ours to word pass unchanged: of the model's own forward, of memory that is out, and an interruption."""

import pytest
import torch

import stepgraph as sg
from helpers.pipes import images, tiny_pipe
from helpers.tiny import inputs, labels, noise, tiny_dit, tiny_scheduler


class OwnError(Exception):
    """What no code of ours knows."""


def fails_with(model, error):
    """A model whose feed-forward fails from now on."""

    def failing(*_, **__):
        raise error

    model.transformer_blocks[1].ff.forward = failing
    return model


@pytest.fixture(scope="module")
def plan(dit):
    return sg.make_plan("full", model=dit, scheduler=tiny_scheduler("ddim"), steps=2)


@pytest.mark.traces
@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, OwnError])
@pytest.mark.parametrize("call", ["make_plan", "compile", "calibrate"])
def test_while_a_forward_is_traced(kind, call, ddim, plan):
    error = kind("of the model")
    model = fails_with(tiny_dit(), error)
    calls = {
        "make_plan": lambda: sg.make_plan("full", model=model, scheduler=ddim, steps=2),
        "compile": lambda: sg.compile(model, plan, inputs(), backend="eager"),
        "calibrate": lambda: sg.calibrate(model, ddim, steps=2, samples=1),
    }
    with pytest.raises(kind) as caught:
        calls[call]()
    assert caught.value is error
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, OwnError])
@pytest.mark.parametrize("call", ["sample", "sample with a model", "attached"])
def test_while_a_plan_runs(kind, call, dit, plan):
    error, done = kind("in a step"), []
    pipe = tiny_pipe(dit)
    exe = sg.compile(dit, plan, inputs(2), backend="eager")

    def failing(*_):
        done.append(True)
        raise error

    def run():
        if call == "attached":
            exe.attach(pipe)
            pipe.scheduler.scale_model_input = failing
            images(pipe, steps=2)
        runner, steps = (exe, None) if call == "sample" else (fails_with(tiny_dit(), error), 2)
        sg.sample(runner, tiny_scheduler("ddim"), noise(), steps=steps, on_step=failing, **labels(3))

    with pytest.raises(kind) as caught:
        run()
    assert caught.value is error
    exe.detach()
