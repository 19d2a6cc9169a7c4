"""Which plans follow other values than those they were compiled with, which warn, and which refuse."""

import copy

import pytest
import torch
from torch import nn

import stepgraph as sg
from helpers.captures import tape  # noqa: F401 (a fixture)
from helpers.tiny import inputs, tiny_dit
from helpers.written_weights import (
    DDIM,
    STEPS,
    choice,
    compiled,
    numbers,
    sampled,
    write_data,
)
from stepgraph.errors import CompileError, MismatchError
from stepgraph.plan.measured import measured


def test_what_was_measured_is_known():
    model = tiny_dit()
    full = compiled(model).plan
    assert measured(full) == "nothing"
    interval = sg.make_plan("interval", model=model, scheduler=DDIM, steps=STEPS, every=2)
    assert measured(sg.forecast(interval)) == "nothing"
    assert measured(sg.lowrank(interval)) == "numbers"
    assert measured(numbers(model).plan) == "numbers"
    chosen = choice(model).plan
    assert measured(chosen) == measured(sg.CachePlan.from_json(chosen.to_json())) == "choice"
    # Files from before the field was there.
    assert measured(chosen.with_header(measured="")) == measured(interval.with_header(policy="l2c", measured="")) == "choice"
    assert measured(interval.with_header(measured="")) == "nothing"


def test_plans_with_numbers_refuse_other_values_until_the_old_are_back():
    model = tiny_dit()
    exe = numbers(model)
    before, state = sampled(exe), copy.deepcopy(model.state_dict())
    write_data(model)
    with pytest.raises(
        MismatchError, match=r"norm1.linear.weight and \d more weights hold other values .* put those weights back"
    ):
        sampled(exe)
    with pytest.raises(MismatchError, match="the plan is for other weights"):
        sg.compile(model, exe.plan, inputs(2), backend="eager")
    with pytest.raises(MismatchError, match="hold other values"):
        exe.on(copy.deepcopy(model))
    model.load_state_dict(state)
    assert torch.equal(sampled(exe), before)


def test_plans_that_chose_warn_once_or_refuse(caplog):
    model = tiny_dit()
    exe, strict = choice(model), choice(model, strict=True)
    caplog.clear()
    for _ in range(2):
        write_data(model)
        assert (sampled(exe) - sampled(exe)).norm() == 0
    assert [record.message for record in caplog.records if "chosen by measuring the former" in record.message] != []
    assert len([record for record in caplog.records if record.name == "stepgraph.weights"]) == 1
    with pytest.raises(MismatchError, match="strict=True refuses others"):
        sampled(strict)
    caplog.clear()
    sampled(sg.compile(model, exe.plan, inputs(2), backend="eager"))
    assert len([record for record in caplog.records if "for other weights" in record.message]) == 1
    with pytest.raises(MismatchError, match="strict=True refuses others"):
        sg.compile(model, exe.plan, inputs(2), backend="eager", strict=True)


def test_plans_that_measured_nothing_follow_any_values():
    plan, other = compiled(tiny_dit()).plan, tiny_dit(seed=9)
    exe = sg.compile(other, plan, inputs(2), backend="eager", exact=True, strict=True)
    assert torch.equal(sampled(exe), sampled(other))


class Scaled(nn.Module):
    """Multiplies with a tensor that is neither a parameter nor a buffer, as caches of tables are."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base, self.tables = base, {"scale": torch.linspace(0.5, 2, width)}

    def forward(self, x: torch.Tensor, *arguments) -> torch.Tensor:
        return self.base(x, *arguments) * self.tables["scale"]


@pytest.mark.parametrize("how", ["in place", "through .data"])
def test_a_tensor_that_is_no_weight_is_watched_like_one(how):
    model = tiny_dit()
    block = model.transformer_blocks[0]
    block.attn1.to_v = Scaled(block.attn1.to_v, block.attn1.to_v.out_features).eval()
    plan = sg.make_plan("interval", model=model, scheduler=DDIM, steps=STEPS, every=1)
    exe = sg.compile(model, plan, inputs(2), backend="eager", exact=True)
    strict = sg.compile(model, plan.with_header(measured="choice"), inputs(2), backend="eager", exact=True, strict=True)
    scale = block.attn1.to_v.tables["scale"]
    assert any(tensor is scale for tensor in exe.weights.held)
    before = exe.session()(**inputs(2), return_dict=False)[0]
    (scale if how == "in place" else scale.data).mul_(1.5)
    with torch.no_grad():
        expected = model(**inputs(2), return_dict=False)[0]
    after = exe.session()(**inputs(2), return_dict=False)[0]
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)
    with pytest.raises(MismatchError, match="outside parameters and buffers"):
        strict.session()(**inputs(2))
    block.attn1.to_v.tables["scale"] = scale.clone()
    with pytest.raises(CompileError, match=r"to_v\.tables\['scale'\]"):
        exe.session()(**inputs(2))
