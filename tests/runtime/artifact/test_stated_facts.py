"""Python values of a model that is saved with its weights: a model that is built anew has its class's own."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import stepgraph as sg
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.errors import CompileError, MismatchError, PlanError


class Louder(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def set_eps(model):
    model.transformer_blocks[0].norm3.eps = 1.0


def set_processor(model):
    model.transformer_blocks[1].attn1.set_processor(Louder())


def add_hook(model):
    model.transformer_blocks[0].ff.register_forward_hook(lambda module, arguments, value: 2 * value)


def replace_forward(model):
    layer, forward = model.transformer_blocks[0].ff, model.transformer_blocks[0].ff.forward
    layer.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def replace_class(model):
    kind = type(model.transformer_blocks[0].ff)
    model.transformer_blocks[0].ff.__class__ = type(
        "FeedForward", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)}
    )


CHANGES = {
    "transformer_blocks.0.norm3.eps = 1.0 (float), one of its class and configuration has 1e-05 (float)": set_eps,
    "transformer_blocks.1.attn1.processor = test_stated_facts.Louder, one of its class and configuration has "
    "diffusers.models.attention_processor.AttnProcessor2_0": set_processor,
    "transformer_blocks.0.ff (hooks) = ": add_hook,
    "transformer_blocks.0.ff (forward) = test_stated_facts.replace_forward.<locals>.<lambda> (code": replace_forward,
    "transformer_blocks.0.ff = test_stated_facts.FeedForward": replace_class,
}


@pytest.mark.parametrize("said", CHANGES, ids=lambda said: CHANGES[said].__name__)
def test_a_model_is_not_rebuilt_without_what_its_forward_read(tmp_path, said):
    model, example = tiny_dit(), inputs(2)
    CHANGES[said](model)
    plan = sg.make_plan("full", model=model, scheduler=tiny_scheduler("ddim"), steps=2)
    sg.compile(model, plan, example, backend="eager", exact=True).save(tmp_path / "artifact", with_weights=True)
    with pytest.raises(MismatchError) as refused:
        sg.load(tmp_path / "artifact")
    assert said.replace("test_stated_facts", __name__) in str(refused.value)
    # What is said to do does it.
    loaded = sg.load(tmp_path / "artifact", model)
    with torch.no_grad():
        assert torch.equal(loaded.session()(**example).sample, model(**example).sample)


def test_what_differs_in_nothing_is_loaded(tmp_path):
    model, example = tiny_dit(), inputs(2)
    plan = sg.make_plan("full", model=model, scheduler=tiny_scheduler("ddim"), steps=2)
    sg.compile(model, plan, example, backend="eager", exact=True).save(tmp_path / "artifact", with_weights=True)
    with torch.no_grad():
        assert torch.equal(sg.load(tmp_path / "artifact").session()(**example).sample, model(**example).sample)


def test_a_model_that_runs_would_refuse_is_not_saved(tmp_path):
    model = tiny_dit()
    plan = sg.make_plan("full", model=model, scheduler=tiny_scheduler("ddim"), steps=2)
    executable = sg.compile(model, plan, inputs(2), backend="eager")
    set_eps(model)
    with pytest.raises(CompileError, match=r"norm3\.eps = 1e-05, which its forward reads; now it is 1\.0"):
        executable.save(tmp_path / "artifact", with_weights=True)
    assert not (tmp_path / "artifact").exists()


def test_accelerate_keeps_a_plan_for_what_the_forward_reads(pipe, tmp_path):
    def kept():
        executable = sg.accelerate(pipe, steps=4, policy="smoothcache", alpha=0.3, samples=1, backend="eager", cache=tmp_path)
        executable.detach()
        return {file.name for file in tmp_path.glob("*")}

    first = kept()
    assert kept() == first
    set_eps(pipe.transformer)
    assert len(kept()) == 2 * len(first)
    pipe.transformer.transformer_blocks[0].norm3.eps = 1e-5
    assert len(kept()) == 2 * len(first)


def test_a_manifest_with_other_facts_is_refused_as_one_of_another_form(tmp_path):
    from stepgraph.runtime.artifact.read_artifact import _model

    model = tiny_dit()
    plan = sg.make_plan("full", model=model, scheduler=tiny_scheduler("ddim"), steps=2)
    about = {"class": plan.header.model, "fingerprint": plan.header.fingerprint, "dtype": plan.header.dtype}
    about |= {"config": {}, "tied": {}}
    assert _model({**about, "facts": {"a": "b"}}, plan, True)["facts"] == {"a": "b"}
    for facts in ({"a": 1}, ["a"], None):
        with pytest.raises(PlanError, match="facts"):
            _model({**about, "facts": facts}, plan, True)
