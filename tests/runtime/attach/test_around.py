"""What runs around an executable, and what callers hand to it beside tensors."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput

import stepgraph as sg
from helpers.pipes import images
from helpers.tiny import inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.errors import CompileError, TraceError


def full(model, scheduler, example=None):
    """An executable that computes everything: the eager model, to the bit."""
    plan = sg.make_plan("full", model=model, scheduler=scheduler, steps=4)
    return sg.compile(model, plan, example or inputs(2), backend="eager", exact=True)


def double(module, arguments, outcome):
    """A forward hook that doubles what a transformer returns."""
    return (2 * outcome[0],) if isinstance(outcome, tuple) else Transformer2DModelOutput(sample=2 * outcome[0])


@pytest.mark.parametrize("before", [True, False], ids=["before compiling", "after"])
def test_a_hook_of_the_model_itself_runs_once_around_what_is_attached(pipe, before):
    model, plain = pipe.transformer, images(pipe)
    handle = model.register_forward_hook(double)
    wanted = images(pipe)
    assert not torch.equal(wanted, plain)
    if not before:
        handle.remove()
    exe = full(model, pipe.scheduler)
    exe.attach(pipe)
    if not before:
        model.register_forward_hook(double)
    assert torch.equal(images(pipe), wanted)
    # Runs of the executable alone would leave it out.
    with pytest.raises(CompileError, match=r"itself has the hook .*double.*remove it, or attach the executable"):
        exe.session()(**inputs(2))
    with pytest.raises(CompileError, match="itself has the hook"):
        sg.sample(exe, pipe.scheduler, noise(1), **labels(3))


def test_a_forward_that_was_replaced_after_compiling_is_not_covered(pipe):
    model = pipe.transformer
    exe, forward = full(model, pipe.scheduler), model.forward
    model.forward = lambda *args, **kwargs: double(model, args, forward(*args, **kwargs))
    for run in (lambda: exe.attach(pipe), lambda: exe.session()(**inputs(2))):
        with pytest.raises(CompileError, match="made of other parts than when it was compiled, such as 'forward'"):
            run()
    wanted = images(pipe)
    again = full(model, pipe.scheduler)
    again.attach(pipe)
    assert torch.equal(images(pipe), wanted)
    # Put over what is attached, it runs around it.
    attached = model.forward
    model.forward = lambda *args, **kwargs: double(model, args, attached(*args, **kwargs))
    doubled = images(pipe)
    model.forward = attached
    again.detach()
    inner = model.forward
    model.forward = lambda *args, **kwargs: double(model, args, inner(*args, **kwargs))
    assert torch.equal(images(pipe), doubled)


def test_gradients_of_an_input_are_refused(pipe):
    exe = full(pipe.transformer, pipe.scheduler)
    exe.attach(pipe)
    pipe.scheduler.set_timesteps(4)
    example = inputs(2, timestep=int(pipe.scheduler.timesteps[0]))
    example["hidden_states"].requires_grad_(True)
    with pytest.raises(CompileError, match="hidden_states requires a gradient, which executables do not compute; detach it"):
        pipe.transformer(**example)
    with torch.no_grad():
        answer = pipe.transformer(**example).sample
        exe.detach()
        assert torch.equal(answer, pipe.transformer(**example).sample)


class Control:
    """An object of the user's that steers attention."""

    def __init__(self, strength=1.0):
        self.strength, self.levels = strength, {"deep": [0.0]}

    def __repr__(self):
        return "Control()"


class Controlled(AttnProcessor2_0):
    def __call__(self, attn, hidden_states, *args, control=None, table=None, **kwargs):
        values = super().__call__(attn, hidden_states, *args, **kwargs)
        more = 0 if control is None else control.strength + control.levels["deep"][0]
        return values + more + (0 if table is None else float(table.sum()))


def test_what_an_argument_holds_counts_not_how_it_is_shown():
    model = tiny_dit()
    for block in model.transformer_blocks:
        block.attn1.set_processor(Controlled())
    control, table = Control(), np.zeros(2000, np.float32)
    example = {**inputs(2), "cross_attention_kwargs": {"control": control, "table": table}}
    exe = full(model, tiny_scheduler("ddim"), example)

    def compare():
        with torch.no_grad():
            wanted = model(**example).sample
        assert torch.equal(exe.session()(**example).sample, wanted)
        return wanted

    seen = [compare()]
    control.strength = 3.0
    seen.append(compare())
    control.levels["deep"][0] = 0.5
    seen.append(compare())
    # Numpy leaves out the middle of what it shows.
    table[1000] = 0.25
    seen.append(compare())
    assert not any(torch.equal(one, other) for i, one in enumerate(seen) for other in seen[:i])
    # Equal contents in another object are the same argument.
    example["cross_attention_kwargs"] = {"control": Control(1.0), "table": np.zeros(2000, np.float32)}
    assert torch.equal(compare(), seen[0])
    assert len(exe.programs) == 4


def test_a_module_among_the_arguments_is_refused(dit):
    example = {**inputs(2), "cross_attention_kwargs": {"gate": torch.nn.Linear(2, 2)}}
    with pytest.raises(TraceError, match="the input cross_attention_kwargs brings a module, whose weights"):
        full(dit, tiny_scheduler("ddim"), example)
