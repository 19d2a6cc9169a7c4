"""Globals that a forward reaches by a roundabout way are facts of its trace, too."""

import operator
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stepgraph.compiler.tracing.trace import trace
from stepgraph.runtime.program.watch import FactsWatch

NUMBER, HOLDER = 2.0, type("Holder", (), {"number": 2.0})()


class OfClasses(type):
    factor = 2.0

    @property
    def number(cls):
        return cls.factor


class WithNumber(metaclass=OfClasses):
    """Has its number of its class's class."""


def set_global(patch):
    patch.setattr(sys.modules[__name__], "NUMBER", 3.0)


WAYS = {
    "globals()": (lambda: globals()["NUMBER"], set_global),
    "eval": (lambda: eval("NUMBER + 1"), set_global),
    "getattr": (lambda: getattr(sys.modules[__name__], "NUM" + "BER"), set_global),
    "attrgetter": (
        lambda: operator.attrgetter("HOLDER.number")(sys.modules[__name__]),
        lambda patch: patch.setattr(HOLDER, "number", 3.0, raising=False),
    ),
    "a class's class": (lambda: WithNumber.number, lambda patch: patch.setattr(OfClasses, "factor", 3.0)),
    "getenv": (lambda: float(os.getenv("A_NUMBER", "2")), lambda patch: patch.setenv("A_NUMBER", "3")),
    "environ": (lambda: float(os.environ.get("A_NUMBER", "2")), lambda patch: patch.setenv("A_NUMBER", "3")),
    "cwd": (lambda: float(len(str(Path.cwd()))), lambda patch: patch.chdir("/")),
}


class Reader(nn.Module):
    """Multiplies by what a function finds."""

    def __init__(self, find):
        super().__init__()
        self.find = find

    def forward(self, x):
        return x * self.find() + self.find()


@pytest.mark.parametrize("way", WAYS)
def test_it_is_noticed(way, monkeypatch):
    find, change = WAYS[way]
    model, x = Reader(find).eval(), torch.ones(2)
    watch = FactsWatch(trace(model, {"x": x}).facts)
    assert not watch.follow(model)
    before = model(x)
    with monkeypatch.context() as patch:
        change(patch)
        assert not torch.equal(model(x), before)
        assert watch.follow(model)
    assert not watch.follow(model)
