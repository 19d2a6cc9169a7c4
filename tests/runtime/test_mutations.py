"""Anything that a forward read is mutated at random: the graph follows with the eager model's bits, or the run is refused."""

import functools
from collections.abc import MutableMapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.five_models import MODELS
from helpers.grown import grow
from stepgraph.compiler.tracing.trace import trace
from stepgraph.inputs import flat_inputs
from stepgraph.runtime.program.watch import FactsWatch

DEPTH = 3
# What happens to values that are no plain ones: functions, classes, modules, objects.
REPLACEMENTS = [None, 3, "other", lambda *args, **kwargs: None]
PLAIN = {
    bool: lambda value, amount: not value,
    int: lambda value, amount: value + amount,
    float: lambda value, amount: value * 0.75 + amount,
    str: lambda value, amount: value + "!" * amount,
}


class Place:
    """Where a value is kept, and how to put another one there."""

    def __init__(self, path, holder, key):
        self.path, self.holder, self.key = path, holder, key
        self.value = holder[key]

    def put(self, value):
        if isinstance(self.holder, dict):
            # Configurations refuse to be written to.
            dict.__setitem__(self.holder, self.key, value)
        else:
            self.holder[self.key] = value

    def __repr__(self):
        return self.path


def within(place, depth=DEPTH):
    """A place and those inside of what is there: entries of dicts and lists, fields of objects."""
    yield place
    value, inner = place.value, {}
    if isinstance(value, dict):
        inner = {f"{place.path}[{key!r}]": (value, key) for key in value}
    elif isinstance(value, list):
        inner = {f"{place.path}[{index}]": (value, index) for index in range(len(value))}
    elif type(value).__module__.startswith(("diffusers", "helpers")) and not isinstance(value, (type, torch.nn.Module)):
        fields = getattr(value, "__dict__", {})
        inner = {f"{place.path}.{name}": (fields, name) for name in fields}
    if depth:
        for path, (holder, key) in inner.items():
            yield from within(Place(path, holder, key), depth - 1)


@functools.cache
def recorded(name):
    """A model of a class with its bound graph, what watches it, and by kind the places of all that was read."""
    make, example = MODELS[name]
    model = make()
    grow(model)
    traced = trace(model, example())
    watcher = FactsWatch(traced.facts)
    assert not watcher.follow(model)
    read = [
        Place(f"{path}.{attribute}", vars(model.get_submodule(path)), attribute)
        for path, part in traced.facts.parts.items()
        for attribute in part.values
        if attribute in vars(model.get_submodule(path))
    ]
    names = [
        Place(f"{names.label}{each}", names.space, each)
        for names in traced.facts.names
        # Libraries with other things in them would not work at all.
        if isinstance(names.space, MutableMapping) and names.label.startswith(("diffusers", "helpers"))
        for each in names.values
        if each in names.space
    ]
    inside = [place for one in read for place in within(one) if place is not one]
    kinds = {
        "attributes": read,
        "fields of processors": [place for place in inside if "processor" in place.path],
        "configuration": [place for place in inside if "_internal_dict" in place.path],
        "entries of dicts and lists": [place for place in inside if "[" in place.path and "_internal" not in place.path],
        "globals": [place for place in names if type(place.value) in PLAIN or callable(place.value)],
        "numbers": [place for place in (*read, *inside) if type(place.value) in PLAIN],
    }
    return model, example(), traced.bind(model), watcher, {kind: places for kind, places in kinds.items() if places}


def eager(model, example):
    with torch.no_grad():
        return model(**example, return_dict=False)[0]


def assert_right_or_refused(name, place, other):
    """Put another value in a place: the run would be refused, or the graph gives the eager model's bits; then put it back."""
    model, example, graph, watcher, _ = recorded(name)
    inputs = list(flat_inputs(example).values())
    place.put(other)
    try:
        if watcher.follow(model):
            return "refused"
        with torch.no_grad():
            assert torch.equal(graph(*inputs)[0], eager(model, example)), place
        return "followed"
    finally:
        place.put(place.value)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_forward_read_is_followed_or_refused(name):
    model, example, graph, watcher, kinds = recorded(name)
    assert {"attributes", "globals", "numbers", "configuration"} <= kinds.keys()
    outcomes = {"refused": 0, "followed": 0}

    @settings(max_examples=25, derandomize=True, deadline=None, database=None)
    @given(data=st.data())
    def mutated(data):
        place = data.draw(st.sampled_from(sorted(kinds)).flatmap(lambda kind: st.sampled_from(kinds[kind])))
        plain = PLAIN.get(type(place.value))
        other = plain(place.value, data.draw(st.integers(1, 3))) if plain else data.draw(st.sampled_from(REPLACEMENTS))
        if other is not place.value:
            outcomes[assert_right_or_refused(name, place, other)] += 1

    mutated()
    assert outcomes["refused"]
    assert not watcher.follow(model)
    with torch.no_grad():
        assert torch.equal(graph(*flat_inputs(example).values())[0], eager(model, example))


@pytest.mark.parametrize("name", MODELS)
def test_a_strength_is_among_what_is_mutated_and_followed(name):
    places = [place for place in recorded(name)[4]["numbers"] if place.path.endswith((".strength", "scales['style']"))]
    assert len(places) == 2
    assert [assert_right_or_refused(name, place, 0.625) for place in places] == ["followed", "followed"]
