"""What a callback changes within a run: strengths are followed from the next call on, anything else is refused at the end."""

import pytest
import torch

import stepgraph as sg
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
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
