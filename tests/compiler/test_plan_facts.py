"""What a forward read when a plan was made: a plan that measured something is not silently compiled with other values."""

import array
import collections
import functools
import types
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import stepgraph as sg
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.compiler.tracing.trace import trace
from stepgraph.errors import MismatchError
from stepgraph.runtime.program.stated_facts import facts_of_plan, other_facts, other_facts_of_plan, stated_facts
from stepgraph.runtime.program.value_texts import name_of, same_text

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
    set_processor: "transformer_blocks.1.attn1.processor is test_plan_facts.Louder, and was "
    "'diffusers.models.attention_processor.AttnProcessor2_0' when the plan was made",
    replace_activation: "transformer_blocks.0.norm1.silu is torch.nn.modules.activation.Sigmoid, and was "
    "'torch.nn.modules.activation.SiLU' when the plan was made",
    add_hook: "transformer_blocks.0.ff (hooks) is test_plan_facts.add_hook.<locals>.<lambda> (code",
    replace_forward: "transformer_blocks.0.ff (forward) is test_plan_facts.replace_forward.<locals>.<lambda> (code",
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


def test_factors_know_what_the_forward_read_when_they_were_measured(tmp_path):
    scheduler = tiny_scheduler("ddim")
    covariances = sg.measure_covariances(scaled(), scheduler, steps=STEPS, samples=1)
    with pytest.raises(
        MismatchError, match=r"what was measured does not fit .*to_v\.strength is 0\.5 \(float\), and was '1\.0"
    ):
        sg.factorize(scaled(0.5), covariances, rank=2)
    sg.factorize(scaled(), covariances, rank=2).save(tmp_path / "factors")
    factors = sg.Factors.load(tmp_path / "factors")
    actions = {"ff": "CLCL"}
    plan = sg.make_plan("manual", model=scaled(0.5), scheduler=scheduler, steps=STEPS, actions=actions)
    with pytest.raises(MismatchError, match=r"factors were made from does not fit .*to_v\.strength is 0\.5"):
        compiled(scaled(0.5), plan, factors=factors)
    compiled(scaled(), plan.with_header(facts={}), factors=factors)
    compiled(scaled(0.5), plan, factors=sg.factorize(scaled(0.5), method="svd", rank=2))
    path = next(path for path in factors.facts if path.endswith("to_v.strength"))
    with pytest.raises(MismatchError, match=r"cannot be merged: .*strength was '1\.0 \(float\)' and '0\.5 \(float\)'"):
        factors.merge(replace(factors, maps={}, errors={}, facts={path: "0.5 (float)"}))


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


class Reads(torch.nn.Module):
    """Reads an attribute of any kind."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x * 2 if self.value is not None else x


def times(number):
    return lambda x: x * number


def of_one_name(double):
    """Two classes of one qualified name, in different modules."""
    return type("AttnProcessor2_0", (), {"__module__": "mine" if double else "theirs"})


# Of every kind of value, one and another.
VALUES = {
    "float": (1.0, 2.0), "float and list": (1.0, [1.0]), "list": ([1.0], [2.0]), "longer list": ([1.0], [1.0, 5.0]),
    "shorter list": ([1.0, 5.0], [1.0]), "empty list": ([1.0], []), "longer tuple": ((1.0,), (1.0, 1.0)),
    "longer deque": (collections.deque([1.0]), collections.deque([1.0, 2.0])), "more keys": ({"a": 1}, {"a": 1, "b": 1}),
    "fewer keys": ({"a": 1, "b": 1}, {"a": 1}), "more names": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=1, b=2)),
    "set": ({1}, {2}), "frozenset": (frozenset([1]), frozenset([1, 2])), "ndarray": (np.zeros(3), np.array([0.0, 0, 1])),
    "array": (array.array("d", [1.0]), array.array("d", [2.0])), "bytearray": (bytearray(b"a"), bytearray(b"b")),
    "tensor": (torch.tensor(1.0), torch.tensor(2.0)), "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "lambda": (lambda x: x, lambda x: x * 2), "constant": (lambda x: x * 2, lambda x: x * 3),
    "name": (lambda x: x.sin(), lambda x: x.cos()), "inner": (lambda x: (lambda: x + 1)(), lambda x: (lambda: x + 2)()),
    "closure": (times(1.0), times(2.0)), "partial": (functools.partial(times, 1), functools.partial(times, 2)),
    "builtin": (torch.sin, torch.cos), "operator": (torch.ops.aten.sin, torch.ops.aten.cos),
    "library": (torch.nn.functional.gelu, torch.nn.functional.silu), "class": (torch.nn.SiLU, torch.nn.Sigmoid),
    "class of one name": (of_one_name(False), of_one_name(True)), "object": (of_one_name(False)(), of_one_name(True)()),
    "module": (np, torch), "long text": ("a" * 500, "a" * 499 + "b"),
}  # fmt: skip


@pytest.mark.parametrize("kind", VALUES)
def test_no_value_of_any_kind_is_taken_for_another(kind):
    def read(value):
        return trace(Reads(value).eval(), {"x": torch.zeros(2, 3)}).facts

    before, other, again = (read(value) for value in (*VALUES[kind], VALUES[kind][0]))
    assert other_facts_of_plan(facts_of_plan(before), again) == ""
    assert other_facts(stated_facts(before), stated_facts(again)) is None
    assert "value" in other_facts_of_plan(facts_of_plan(before), other)
    assert other_facts(stated_facts(before), stated_facts(other)) is not None


def test_a_plain_copy_of_a_value_is_the_same():
    facts = [trace(Reads(value).eval(), {"x": torch.zeros(2, 3)}).facts for value in (
        {"a": torch.ones(3), "b": [np.zeros(2), {1, 2}]}, {"a": torch.ones(3), "b": [np.zeros(2), {2, 1}]},
    )]  # fmt: skip
    assert other_facts_of_plan(facts_of_plan(facts[0]), facts[1]) == ""


def test_code_of_another_version_of_python_is_not_compared():
    text = name_of(times)
    assert f"{__name__}.times (code 3." in text
    older = text.replace("(code 3.", "(code 2.").replace(text[-3:], "00)")
    assert same_text(text, older)
    assert not same_text(text, older.replace("times", "adds"))
    assert not same_text(text, text[:-3] + ("00)" if text[-3:] != "00)" else "11)"))


def test_a_script_has_the_name_under_which_it_is_imported(monkeypatch):
    script = types.SimpleNamespace(__spec__=None, __file__="/somewhere/train.py")
    monkeypatch.setitem(__import__("sys").modules, "__main__", script)
    assert name_of(type("Layer", (), {"__module__": "__main__"})) == "train.Layer"
