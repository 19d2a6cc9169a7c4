"""Strengths: what multiplies tensors is followed with the bits of the eager model; all else is held to its number."""

import decimal
import math
import numbers

import numpy as np
import pytest
import torch
from torch import nn

from stepgraph.compiler.tracing.trace import trace
from stepgraph.runtime.program.watch import FactsWatch

HALF = 0.3


class Scaled(nn.Module):
    """A forward with a number, alone and in a dict."""

    def __init__(self, forward, strength=HALF):
        super().__init__()
        self.inner, self.run = nn.Linear(6, 6), forward
        self.strength, self.scaling, self.size = strength, {"one": strength, "two": 2.0, "rank": 4}, 4

    def forward(self, x):
        return self.run(self, x)


def followed(model, x):
    """The bound graph, what looks after it, and the paths that it follows."""
    traced = trace(model, {"x": x})
    watch = FactsWatch(traced.facts)
    assert not watch.follow(model)
    return traced.bind(model), watch, [strength.path for strength in traced.facts.strengths]


PRODUCTS = {
    "x * s": lambda m, x: x * m.strength,
    "s * x": lambda m, x: m.strength * x,
    "torch.mul": lambda m, x: torch.mul(x, m.strength),
    "x.mul": lambda m, x: x.mul(m.strength),
    "behind None": lambda m, x: x if m.strength is None else x * m.strength,
    "twice": lambda m, x: m.strength * m.inner(x * m.strength),
    "in a dict": lambda m, x: m.inner(x) * m.scaling["one"],
    "got of a dict": lambda m, x: m.inner(x) * m.scaling.get("one"),
    "values": lambda m, x: sum(x * value for name, value in m.scaling.items() if name == "one"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_follow_with_the_eager_models_bits(name, dtype):
    model = Scaled(PRODUCTS[name]).eval().to(dtype)
    x = torch.randn(64, 6).to(dtype)
    graph, watch, paths = followed(model, x)
    assert paths == (["scaling['one']"] if "dict" in name or name == "values" else ["strength"])
    for value in (HALF, 0.1, -1.7, 0.0, 3, 1e-9, 0.7):
        model.strength = model.scaling["one"] = value
        assert not watch.follow(model)
        with torch.no_grad():
            assert torch.equal(graph(x)[0], model(x)), value


DECIDING = {
    "added": lambda m, x: x + m.strength,
    "divided by": lambda m, x: x / m.strength,
    "sum of numbers": lambda m, x: x * (m.strength + 1),
    "product of numbers": lambda m, x: x * (m.strength * 2),
    "compared": lambda m, x: x * m.strength if m.strength > 0.2 else x,
    "truth": lambda m, x: x * m.strength if m.strength else x,
    "formatted": lambda m, x: x * m.strength if f"{m.strength:.1f}" == "0.3" else x,
    "hashed": lambda m, x: x * m.strength if m.strength in {HALF} else x,
    "in place": lambda m, x: m.inner(x).mul_(m.strength),
    "alpha": lambda m, x: torch.add(x, x, alpha=m.strength),
    "exponent": lambda m, x: x.abs() ** m.strength,
    "whole tensor of it": lambda m, x: x + torch.full((6,), m.strength),
    "of a tensor without dimensions": lambda m, x: x + x.sum() * m.strength,
    "of whole numbers": lambda m, x: x.long() * m.strength,
    "by C": lambda m, x: x * math.sqrt(m.strength),
    "by C, and multiplied": lambda m, x: x * math.sqrt(m.strength) * m.strength,
    "fmax": lambda m, x: x * m.strength * math.fmod(m.strength, 0.2),
    "isclose": lambda m, x: x if math.isclose(m.strength, 0.25) else x * m.strength + 1,
    "isclose, of one object": lambda m, x: (lambda s: x if math.isclose(s, 0.25) else x * s)(m.strength),
    "percent": lambda m, x: x * m.strength + {"0.2": 3.0}.get("%.1f" % m.strength, 0.0),  # noqa: UP031
    "of numpy": lambda m, x: x * m.strength + float(np.clip(m.strength, 0.26, 1.0)),
    "of a C float only": lambda m, x: x * m.strength + float(decimal.Decimal(m.strength)),
    "in a list": lambda m, x: x * m.strength + torch.tensor([m.strength] * 6),
    "in a leaf": lambda m, x: nn.functional.leaky_relu(x, m.strength),
    "dict's": lambda m, x: x + m.scaling["one"],
}


@pytest.mark.parametrize("name", DECIDING)
def test_a_number_that_anything_else_depends_on_is_held_to(name):
    model, x = Scaled(DECIDING[name]).eval(), torch.randn(4, 6)
    graph, watch, paths = followed(model, x)
    assert paths == []
    with torch.no_grad():
        assert torch.equal(graph(x)[0], model(x))
    model.strength = model.scaling["one"] = 0.25
    found = [difference.path for difference in watch.follow(model)]
    assert found == ["scaling['one']" if name == "dict's" else "strength"]


ASKING = {
    "isinstance": lambda m, x: x * m.strength if isinstance(m.strength, float) else x,
    "of numbers": lambda m, x: x * m.strength if isinstance(m.strength, numbers.Real) else x,
}


@pytest.mark.parametrize("name", ASKING)
def test_one_whose_class_was_asked_stays_a_float(name):
    model, x = Scaled(ASKING[name]).eval(), torch.randn(4, 6)
    graph, watch, paths = followed(model, x)
    assert paths == ["strength"]
    model.strength = 0.5
    assert not watch.follow(model)
    assert torch.equal(graph(x)[0], model(x))
    model.strength = 2
    assert [difference.path for difference in watch.follow(model)] == ["strength"]


def test_one_that_decides_does_not_keep_another_from_being_followed():
    model = Scaled(lambda m, x: x * math.sqrt(m.strength) * m.scaling["two"]).eval()
    paths = followed(model, torch.randn(4, 6))[2]
    assert paths == ["scaling['two']"]


def test_what_is_written_to_a_dict_of_strengths_is_written():
    def forward(m, x):
        before = dict(m.scaling)
        m.scaling["one"] = 0.5
        m.scaling.update(before)
        return x * m.scaling["two"]

    model = Scaled(forward).eval()
    trace(model, {"x": torch.randn(4, 6)})
    assert model.scaling == {"one": HALF, "two": 2.0, "rank": 4}
    assert {type(value) for value in model.scaling.values()} == {float, int}
    assert type(model.scaling) is dict
    assert type(model.strength) is float


def test_a_number_that_is_set_for_a_time_stays_what_it_was():
    def forward(m, x):
        before, y = m.strength, x * m.strength
        m.strength = 0.5
        y = y + x * m.strength
        m.strength = before
        return y * m.scaling["two"]

    model, x = Scaled(forward).eval(), torch.randn(4, 6)
    graph, _, paths = followed(model, x)
    assert paths == ["scaling['two']"]
    assert torch.equal(graph(x)[0], model(x))
    assert (type(model.strength), model.strength) == (float, HALF)


def test_two_programs_that_share_a_trace_do_not_mislead_each_other():
    model, x = Scaled(PRODUCTS["x * s"]).eval(), torch.randn(4, 6)
    traced = trace(model, {"x": x})
    one, other = FactsWatch(traced.facts), FactsWatch(traced.facts)
    graph, first = traced.bind(model), model.strength
    for watch, value in ((one, first), (other, first), (one, 0.5), (other, first), (one, 0.5), (other, 0.5), (one, first)):
        model.strength = value
        assert not watch.follow(model)
        assert torch.equal(graph(x)[0], model(x))


@pytest.mark.parametrize("place", ["class", "module", "hook"])
def test_what_replaces_a_leafs_forward_before_tracing_is_traced(monkeypatch, place):
    model, x = Scaled(lambda m, x: m.inner(x)).eval(), torch.randn(4, 6)
    with torch.no_grad():
        plain, original = model(x), nn.Linear.forward
    if place == "class":
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * original(self, x))
    elif place == "module":
        model.inner.forward = lambda x: 2 * original(model.inner, x)
    else:
        model.inner.register_forward_hook(lambda module, args, result: 2 * result)
    graph, _, _ = followed(model, x)
    with torch.no_grad():
        assert torch.equal(graph(x)[0], model(x))
        assert torch.equal(graph(x)[0], 2 * plain)
