"""Strengths of adapters are followed from run to run, whatever else was read is refused when it changes."""

import copy

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.grown import Grown, attention, grow
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.errors import CompileError, MismatchError


def compiled(model, example, **options):
    plan = sg.make_plan("full", model=model, scheduler=tiny_scheduler("ddim"), steps=2, example_inputs=example)
    return sg.compile(model, plan, example, **{"backend": "eager", "exact": True, **options})


def test_a_strength_is_followed_and_what_decides_is_refused():
    model = tiny_dit()
    adapter, example = grow(model), inputs(batch=2)
    executable = compiled(model, example)

    def compare():
        with torch.no_grad():
            wanted = model(**example).sample
        assert torch.equal(executable.session()(**example).sample, wanted)
        return wanted

    first = compare()
    adapter.strength = 0.125
    assert not torch.equal(compare(), first)
    adapter.scales["style"] = 0
    compare()
    adapter.strength, adapter.scales["style"] = 0.5, 0.25
    assert torch.equal(compare(), first)
    adapter.active = []
    with pytest.raises(
        CompileError, match=r"to_v\.active\[0\] = 'style'.*now it is nothing.*Set it back, or detach, and compile"
    ):
        executable.session()(**example)
    adapter.active = ["style"]
    compare()
    adapter.strength = None
    with pytest.raises(CompileError, match=r"to_v\.strength = 0\.5.*now it is None"):
        executable.session()(**example)


def test_a_strength_is_as_much_a_value_that_was_measured_as_a_weight():
    model, example = tiny_dit(), inputs(batch=2)
    adapter, scheduler = grow(model), diffusers.DDIMScheduler(clip_sample=False)
    plans = {
        "numbers": sg.make_plan("whole-step", model=model, scheduler=scheduler, steps=2, samples=1),
        "choice": sg.make_plan("full", model=model, scheduler=scheduler, steps=2).with_header(measured="choice"),
    }
    fitted = sg.compile(model, plans["numbers"], example, backend="eager")
    strict = sg.compile(model, plans["choice"], example, backend="eager", strict=True)
    lenient = sg.compile(model, plans["choice"], example, backend="eager")
    for executable in (fitted, strict, lenient):
        executable.session()(**example)
    adapter.strength = 0.125
    for executable in (fitted, strict):
        # Not only the first time.
        for _ in range(2):
            with pytest.raises(MismatchError, match=r"to_v\.strength is 0\.125, and was 0\.5 when the plan was compiled"):
                executable.session()(**example)
    assert not lenient.weights.warned
    lenient.session()(**example)
    assert lenient.weights.warned
    adapter.strength = 0.5
    fitted.session()(**example)


def test_attaching_to_another_model_looks_at_its_values():
    model = tiny_dit()
    grow(model)
    executable = compiled(model, inputs(batch=2))
    other = copy.deepcopy(model)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8).eval()
    pipe = diffusers.DiTPipeline(other, vae, diffusers.DDIMScheduler())
    attention(other).to_v.active.append("style")
    with pytest.raises(CompileError, match=r"to_v\.active\[1\]"):
        executable.attach(pipe)
    attention(other).to_v.active.pop()
    executable.attach(pipe).detach()


@pytest.mark.parametrize("options", [{"exact": False}, {"backend": "inductor", "exact": False}], ids=["hoisted", "inductor"])
def test_tables_and_regions_follow_strengths(options):
    model, example = tiny_dit(), inputs(batch=2)
    block = model.transformer_blocks[0].norm1
    # One that the tables depend on, and one in the loop.
    block.linear, adapter = Grown(block.linear).eval().requires_grad_(False), grow(model)
    executable = compiled(model, example, **options)
    for strength in (0.5, 0.125, 2.0):
        block.linear.strength = adapter.scales["style"] = strength
        with torch.no_grad():
            wanted = model(**example).sample
        torch.testing.assert_close(executable.session()(**example).sample, wanted, rtol=1e-4, atol=1e-5)
    assert {s.name for s in executable.default.facts.strengths} == {"strength", "scales"}


def test_an_export_has_the_strengths_of_its_time(tmp_path):
    model, example = tiny_dit(), inputs(batch=2)
    adapter = grow(model)
    executable = compiled(model, example)
    adapter.strength = 0.125
    executable.export(tmp_path / "exported", format="pt2")
    (constant,) = next(s for s in executable.default.facts.strengths if s.name == "strength").constants
    assert float(constant) == 0.125
    adapter.active.clear()
    with pytest.raises(CompileError, match=r"to_v\.active"):
        executable.export(tmp_path / "other", format="pt2")
