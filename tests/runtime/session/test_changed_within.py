"""What a callback changes within a run: strengths are followed from the next call on, anything else is refused at the end."""

import copy

import pytest
import torch

import stepgraph as sg
from helpers.loras import eager, load, tiny_sd3
from helpers.pixart_sd3 import planned, sd3_inputs
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.adapters import is_tuner
from stepgraph.errors import CompileError, MismatchError

STEPS = 4


class Scaled(torch.nn.Module):
    """A layer with a strength, as a LoRA has one, and an offset."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scales, self.offset = base, {"style": 1.0}, 0.0

    def forward(self, x):
        return self.base(x) * self.scales["style"] + self.offset


def grown():
    """A model with a strength in its loop, and one that the tables depend on."""
    model = tiny_dit()
    attention, norm = model.transformer_blocks[0].attn1, model.transformer_blocks[1].norm1
    attention.to_v, norm.linear = Scaled(attention.to_v).eval(), Scaled(norm.linear).eval()
    return model, (attention.to_v, norm.linear)


def calls():
    scheduler = tiny_scheduler("ddim")
    scheduler.set_timesteps(STEPS)
    return [inputs(2, seed=step, timestep=int(timestep)) for step, timestep in enumerate(scheduler.timesteps)]


def compiled(model, policy="full", **options):
    scheduler = tiny_scheduler("ddim")
    scheduler.register_to_config(clip_sample=False)
    arguments = {"samples": 1} if policy == "whole-step" else {}
    plan = sg.make_plan(policy, model=model, scheduler=scheduler, steps=STEPS, **arguments)
    return sg.compile(model, plan, inputs(2), **{"backend": "eager", "exact": True, **options})


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "tables of all steps"])
def test_a_strength_that_fades_within_a_run_is_followed(exact):
    model, layers = grown()
    exe, fading = compiled(model, exact=exact), [1.0, 0.5, 0.5, 0.0]
    for _ in range(2):
        session = exe.session()
        for strength, call in zip(fading, calls(), strict=True):
            for layer in layers:
                layer.scales["style"] = strength
            with torch.no_grad():
                wanted = model(**call).sample
            result = session(**call).sample
            assert torch.equal(result, wanted) if exact else torch.allclose(result, wanted, rtol=1e-4, atol=1e-5)
        assert session.finished


def test_a_plan_with_fitted_numbers_does_not_follow_within_a_run_either():
    model, layers = grown()
    exe = compiled(model, "whole-step")
    session = exe.session()
    first, second, *_ = calls()
    session(**first)
    layers[0].scales["style"] = 0.5
    with pytest.raises(MismatchError, match=r"to_v\.scales\['style'\] is 0\.5, and was 1\.0"):
        session(**second)


def test_what_decides_is_refused_at_the_end_of_the_run_it_changed_in():
    model, layers = grown()
    exe = compiled(model)
    session = exe.session()
    for step, call in enumerate(calls()):
        if step == 2:
            layers[0].offset = 1.0
        if step < STEPS - 1:
            session(**call)
    with pytest.raises(CompileError, match=r"was changed within the run: .*to_v\.offset was 0\.0 when it began, and is 1\.0"):
        session(**call)
    # Of a run that was over before, the next one's beginning speaks.
    layers[0].offset = 0.0
    session = exe.session()
    for call in calls():
        session(**call)
    layers[0].offset = 1.0
    with pytest.raises(CompileError, match=r"was compiled with .*to_v\.offset = 0\.0"):
        exe.session()(**call)


def exchange_module(model):
    model.proj_out_2 = copy.deepcopy(model.proj_out_2)
    model.proj_out_2.weight.data.mul_(2)


def assign(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)


def replace_data(model):
    model.proj_out_2.weight.data = model.proj_out_2.weight * 2


def test_a_module_that_is_exchanged_is_refused_at_the_end():
    model = tiny_dit()
    exe = compiled(model)
    session, (*most, last) = exe.session(), calls()
    for call in most:
        session(**call)
    exchange_module(model)
    with pytest.raises(CompileError, match="made of other parts than when it was compiled, such as 'proj_out_2'"):
        session(**last)


@pytest.mark.parametrize("change", [assign, replace_data], ids=lambda change: change.__name__)
def test_weights_that_become_others_are_refused_at_the_end(change):
    model = tiny_dit()
    exe = compiled(model)
    session, (*most, last) = exe.session(), calls()
    for step, call in enumerate(most):
        if step == 2:
            change(model)
        session(**call)
    with pytest.raises(CompileError, match=r"changed within the run: [a-z_0-9.]+( and \d+ more)? became another tensor"):
        session(**last)
    # The next run is the model's as it is now.
    session = exe.session()
    for call in calls():
        with torch.no_grad():
            assert torch.equal(session(**call).sample, model(**call).sample)


def test_weights_that_another_run_has_followed_meanwhile_are_refused_too():
    model = tiny_dit()
    exe = compiled(model)
    session, other, (*most, last) = exe.session(), exe.session(), calls()
    for call in most:
        session(**call)
    replace_data(model)
    other(**most[0])
    with pytest.raises(CompileError, match="changed within the run: a weight became another tensor"):
        session(**last)


def test_a_strength_in_a_tensor_is_followed_within_a_run():
    model = tiny_sd3()
    model.enable_lora_hotswap(target_rank=2)
    load(model, "style", 1)
    held = [module.scaling["style"] for module in model.modules() if is_tuner(type(module))]
    assert all(isinstance(strength, torch.Tensor) for strength in held)
    exe = sg.compile(model, planned(model, sd3_inputs(), {}, steps=3), sd3_inputs(), backend="eager", exact=True)
    session, results = exe.session(), []
    for number in (1.0, 0.25):
        for strength in held:
            strength.fill_(number)
        results.append(session(**sd3_inputs(), return_dict=False)[0])
        assert torch.equal(results[-1], eager(model))
    assert not torch.equal(*results)
    # Past the version, nothing but the number tells.
    held[0].data.fill_(3.0)
    with pytest.raises(CompileError, match="changed within the run: a strength was written to past its version"):
        session(**sd3_inputs())
    assert torch.equal(exe.session()(**sd3_inputs(), return_dict=False)[0], eager(model))
