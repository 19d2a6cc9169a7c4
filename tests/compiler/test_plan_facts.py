"""What a forward read when a plan was made: a plan that measured something is not silently compiled with other values."""

import warnings

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import stepgraph as sg
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.errors import MismatchError

STEPS = 4


class Scaled(torch.nn.Module):
    """A layer with a strength of the user's own."""

    def __init__(self, base):
        super().__init__()
        self.base, self.strength = base, 1.0

    def forward(self, x):
        return self.base(x) * self.strength


class Louder(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def scaled(strength: float = 1.0):
    model = tiny_dit()
    for block in model.transformer_blocks:
        block.attn1.to_v = Scaled(block.attn1.to_v).eval()
        block.attn1.to_v.strength = strength
    return model


def compiled(model, plan, **options):
    return sg.compile(model, plan, inputs(2), backend="eager", exact=True, **options)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A plan whose numbers were measured with strength 1, from its file."""
    scheduler = tiny_scheduler("ddim")
    scheduler.register_to_config(clip_sample=False)
    plan = sg.make_plan("whole-step", model=scaled(), scheduler=scheduler, steps=STEPS, samples=1)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    return sg.CachePlan.load(path)


def set_strength(model):
    model.transformer_blocks[1].attn1.to_v.strength = 0.5


def set_eps(model):
    model.transformer_blocks[0].norm3.eps = 0.5


def set_processor(model):
    model.transformer_blocks[1].attn1.processor = Louder()


def replace_activation(model):
    model.transformer_blocks[0].norm1.silu = torch.nn.Sigmoid().eval()


def add_hook(model):
    model.transformer_blocks[0].ff.register_forward_hook(lambda module, arguments, value: 2 * value)


def replace_forward(model):
    layer, forward = model.transformer_blocks[0].ff, model.transformer_blocks[0].ff.forward
    layer.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


CHANGES = {
    set_strength: "transformer_blocks.1.attn1.to_v.strength is 0.5 (float), and was '1.0 (float)' when the plan was made",
    set_eps: "transformer_blocks.0.norm3.eps is 0.5 (float), and was '1e-05 (float)' when the plan was made",
    set_processor: "transformer_blocks.1.attn1.processor is Louder, and was 'AttnProcessor2_0' when the plan was made",
    replace_activation: "transformer_blocks.0.norm1.silu is Sigmoid, and was 'SiLU' when the plan was made",
    add_hook: "transformer_blocks.0.ff (hooks) is test_plan_facts.add_hook.<locals>.<lambda>, and was 'nothing' when the plan",
    replace_forward: "transformer_blocks.0.ff (forward) is builtins.function, and was 'nothing' when the plan was made",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_plan_with_fitted_numbers_is_refused_with_other_values(fitted, change):
    model = scaled()
    change(model)
    with pytest.raises(MismatchError) as refused:
        compiled(model, fitted)
    assert CHANGES[change].replace("test_plan_facts", __name__) in str(refused.value)
    assert "computes with numbers that were measured" in str(refused.value)


def test_a_plan_with_fitted_numbers_fits_what_it_was_made_on(fitted):
    compiled(scaled(), fitted)
    # A file that does not say what was read is taken as before.
    compiled(scaled(0.5), fitted.with_header(facts={}))


def test_a_plan_that_chose_by_measuring_follows_with_one_warning_or_is_strict(caplog):
    plan = sg.make_plan("full", model=scaled(), scheduler=tiny_scheduler("ddim"), steps=STEPS)
    chosen = plan.with_header(measured="choice")
    with caplog.at_level("WARNING", logger="stepgraph"):
        exe = compiled(scaled(0.5), chosen)
    (said,) = (record.getMessage() for record in caplog.records)
    assert "to_v.strength is 0.5 (float), and was '1.0 (float)' when the plan was made; the plan goes on" in said
    caplog.clear()
    given = inputs(2, timestep=int(plan.header.timesteps[0]))
    with torch.no_grad(), caplog.at_level("WARNING", logger="stepgraph"):
        assert torch.equal(exe.session()(**given).sample, scaled(0.5)(**given).sample)
        with pytest.raises(MismatchError, match="strict=True refuses"):
            compiled(scaled(0.5), chosen, strict=True)
        # One that measured nothing says nothing.
        compiled(scaled(0.5), plan, strict=True)
    assert not caplog.records


def test_what_is_alike_in_all_blocks_stands_once():
    model = scaled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = sg.make_plan("full", model=model, scheduler=tiny_scheduler("ddim"), steps=1).header.facts
        set_strength(model)
        other = sg.make_plan("full", model=model, scheduler=tiny_scheduler("ddim"), steps=1).header.facts
    name = "transformer_blocks.{}.attn1.to_v.strength"
    assert facts[name.format("*")] == "1.0 (float)"
    assert [other[name.format(block)] for block in (0, 1)] == ["1.0 (float)", "0.5 (float)"]
    assert name.format("*") not in other
    assert name.format(0) not in facts
    assert {path for path in facts if facts.get(path) != other.get(path)} == {name.format("*")}
