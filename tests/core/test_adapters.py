"""The base of a model with adapters, and what a plan makes of adapters that it was not made with."""

import copy
import json

import pytest
import torch

import stepgraph as sg
from helpers.loras import load, tiny_sd3
from helpers.pixart_sd3 import planned, sd3_inputs
from stepgraph.adapters import base_paths
from stepgraph.errors import MismatchError
from stepgraph.fingerprint import adapters_hash, contents_hash, fingerprint, structure_hash
from stepgraph.plan import CachePlan
from stepgraph.plan.header import CHOICE
from stepgraph.plan.refuse_other import follow_model


def adapted(seed: int = 1):
    model = tiny_sd3()
    load(model, "one", seed)
    return model


def chosen(model) -> CachePlan:
    """A plan whose choice was measured."""
    return planned(model, sd3_inputs(), {}).with_header(measured=CHOICE)


def fitted(model) -> CachePlan:
    """A plan with numbers that were measured."""
    return planned(model, sd3_inputs(), {}).with_header(factors="0" * 16)


def test_a_base_with_a_lora_has_the_fingerprint_of_the_base():
    plain, model = tiny_sd3(), adapted()
    assert fingerprint(model) == fingerprint(plain)
    assert structure_hash(model, adapters=True) != structure_hash(plain)
    assert contents_hash(model, adapters=True) != contents_hash(plain)
    kinds = {path: type(module) for path, module in model.named_modules()}
    assert sorted(base_paths(kinds).values()) == sorted(path for path, _ in plain.named_modules())
    model.fuse_lora()
    assert fingerprint(model) != fingerprint(plain)


def test_the_hash_of_adapters_is_of_those_that_take_part():
    model = adapted()
    one = adapters_hash(model)
    assert adapters_hash(tiny_sd3()) == "" != one
    assert adapters_hash(adapted()) == one != adapters_hash(adapted(seed=2))
    model.set_adapters("one", 0.5)
    assert adapters_hash(model) not in ("", one)
    model.set_adapters("one")
    load(model, "two", 2)
    model.set_adapters("one")
    assert adapters_hash(model) == one
    model.set_adapters(["one", "two"])
    assert adapters_hash(model) != one
    model.disable_lora()
    assert adapters_hash(model) == ""
    model.enable_lora()
    model.set_adapters("one")
    assert adapters_hash(model) == one


def test_a_plan_knows_the_adapters_that_it_was_made_with():
    model = adapted()
    plan = CachePlan.from_json(chosen(model).to_json())
    assert plan.header.adapters == plan.header.made_with == adapters_hash(model)
    assert follow_model(plan, model) == ""
    assert "made with others" in follow_model(plan, tiny_sd3())
    assert "this model has none" in follow_model(plan, tiny_sd3())
    with pytest.raises(MismatchError, match="make a plan for these weights"):
        follow_model(plan, tiny_sd3(), strict=True)


@pytest.mark.parametrize("make", [chosen, fitted])
def test_a_plan_of_the_base_with_a_lora(make):
    plan = make(tiny_sd3())
    if make is fitted:
        with pytest.raises(MismatchError, match=r"made without adapters, this model has 'one' \("):
            follow_model(plan, adapted())
    else:
        assert "made without adapters, this model has 'one'" in follow_model(plan, adapted())
        with pytest.raises(MismatchError, match="strict=True"):
            follow_model(plan, adapted(), strict=True)
    assert follow_model(planned(tiny_sd3(), sd3_inputs(), {}), adapted(), strict=True) == ""

    declared = CachePlan.from_json(plan.for_any_adapters().to_json())
    assert declared.header.adapters == "any"
    assert declared.header.any_adapters
    assert "declared to hold for any adapters" in follow_model(declared, adapted(), strict=True)
    assert follow_model(declared, tiny_sd3()) == ""
    merged = adapted()
    merged.fuse_lora()
    assert "declared to hold for any adapters" in follow_model(declared, merged, strict=True)
    # Other weights are no adapters.
    other = adapted()
    with torch.no_grad():
        other.proj_out.weight.mul_(1.5)
    if make is fitted:
        with pytest.raises(MismatchError, match="other weights"):
            follow_model(declared, other)
    else:
        assert "declared" not in follow_model(declared, other)


def test_a_plan_declared_for_any_keeps_what_it_was_made_with():
    plan = chosen(adapted())
    declared = plan.for_any_adapters().for_any_adapters()
    assert declared.header.adapters == f"any {plan.header.adapters}"
    assert declared.header.made_with == plan.header.adapters
    assert follow_model(declared, adapted()) == ""
    assert "declared" in follow_model(declared, adapted(seed=2))


def test_plans_without_the_field_load_and_fit_as_they_did():
    model = adapted()
    text = json.loads(chosen(model).to_json())
    del text["adapters"]
    old = CachePlan.from_json(json.dumps(text))
    assert old.header.adapters == ""
    assert follow_model(old.with_header(fingerprint=fingerprint(tiny_sd3())), tiny_sd3()) == ""
    whole = f"{structure_hash(model, adapters=True)}/{contents_hash(model, adapters=True)}"
    before = old.with_header(fingerprint=whole)
    assert follow_model(before, model, strict=True) == ""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.transformer_blocks[0].attn.to_q.lora_B["one"].weight.mul_(2)
    assert "other weights" in follow_model(before, changed)
    with pytest.raises(MismatchError, match="another SD3Transformer2DModel"):
        follow_model(before, tiny_sd3())


@pytest.mark.parametrize("value", ["some", "any a", "0123", "any  0123456789abcdef", 3])
def test_the_field_is_checked(value):
    with pytest.raises(sg.PlanError, match="adapters is"):
        chosen(tiny_sd3()).with_header(adapters=value)
