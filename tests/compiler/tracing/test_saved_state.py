"""A refused trace leaves the model as it was: eager gives what it gave, and nothing holds a traced tensor."""

import functools
import gc
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stepgraph.compiler.tracing.trace import trace
from stepgraph.compiler.tracing.traced_tensor import TracedTensor
from stepgraph.errors import TraceError

SEEN: list[torch.Tensor] = []
LATEST: dict[str, torch.Tensor] = {}
PAIR: tuple[torch.Tensor, ...] = ()


class Settings:
    """Not a module, as attention processors are none."""

    def __init__(self) -> None:
        self.last, self.history = None, []


@functools.lru_cache
def doubled(holder: "Holder") -> torch.Tensor:
    return holder.inner(holder.table) * 2


def in_a_closure():
    kept = []

    def forward(module: "Holder", x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x + len(kept)

    return forward


def in_a_global_tuple(module: "Holder", x: torch.Tensor) -> torch.Tensor:
    global PAIR
    PAIR = (*PAIR, x)
    return x + len(PAIR)


class Holder(nn.Module):
    """A model whose forward keeps something of a call; how, is given. `shared` belongs to all of its kind."""

    shared: list[torch.Tensor] = []  # noqa: RUF012

    def __init__(self, keep) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.keep, self.inner, self.table = keep, nn.Linear(4, 4), torch.ones(4)
        self.pairs, self.items, self.latest = (), [], None
        self.nested = {"levels": [[], {"deep": deque()}]}
        self.settings, self.space, self.names = Settings(), SimpleNamespace(past=[]), {"a"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.keep(self, self.inner(x))


def append(of):
    """A forward that appends to a list of the model, and depends on how many there are."""

    def keep(module: Holder, x: torch.Tensor) -> torch.Tensor:
        values = of(module)
        values.append(x)
        return x * len(values)

    return keep


def assign(name: str, value):
    def keep(module: Holder, x: torch.Tensor) -> torch.Tensor:
        setattr(module, name, value(module, x))
        return x + sum(part.sum() for part in getattr(module, name))

    return keep


def in_settings(module: Holder, x: torch.Tensor) -> torch.Tensor:
    last, module.settings.last = module.settings.last, x
    return x if last is None else x - last


def in_a_set(module: Holder, x: torch.Tensor) -> torch.Tensor:
    module.names.add(f"call {len(module.names)}")
    return x * len(module.names)


def then_dies(module: Holder, x: torch.Tensor) -> torch.Tensor:
    module.items.append(doubled(module))
    return x * float(x.sum())


KEEPS = {
    "list": append(lambda module: module.items),
    "tuple": assign("pairs", lambda module, x: (*module.pairs, x)),
    "new list": assign("items", lambda module, x: [*module.items, x]),
    "object's list": append(lambda module: module.settings.history),
    "object": in_settings,
    "namespace": append(lambda module: module.space.past),
    "nested list": append(lambda module: module.nested["levels"][0]),
    "nested deque": append(lambda module: module.nested["levels"][1]["deep"]),
    "set": in_a_set,
    "class": append(lambda module: Holder.shared),
    "global list": append(lambda module: SEEN),
    "global tuple": in_a_global_tuple,
    "closure": in_a_closure(),
    "memo, then data": then_dies,
}


@pytest.mark.parametrize("name", KEEPS)
def test_a_refused_trace_leaves_the_model_as_it_was(name: str):
    x = torch.arange(8.0).reshape(2, 4)
    model, twin = (Holder(KEEPS[name]).eval() for _ in range(2))
    with torch.no_grad():
        expected = twin(x)
    # What the twin left where both of them keep it.
    Holder.shared.clear()
    SEEN.clear()
    globals()["PAIR"] = ()
    for cell in KEEPS[name].__closure__ or ():
        if isinstance(cell.cell_contents, list):
            cell.cell_contents.clear()
    with pytest.raises(TraceError):
        trace(model, {"x": x})
    assert not any(type(thing) is TracedTensor for thing in _reachable(model))
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def _reachable(model: Holder) -> list[object]:
    """What the model's attributes, this module's globals and the memo lead to, within a few steps."""
    roots = [vars(module) for module in model.modules()]
    known, layer = {}, [*roots, SEEN, LATEST, PAIR, Holder.shared, doubled, model.keep]
    for _ in range(6):
        layer = [thing for holder in layer for thing in gc.get_referents(holder) if id(thing) not in known]
        layer = [thing for thing in layer if not isinstance(thing, type) and thing is not globals()]
        known |= {id(thing): thing for thing in layer}
    return list(known.values())


def test_containers_are_the_ones_they_were():
    model = Holder(append(lambda module: module.nested["levels"][0])).eval()
    levels, first = model.nested["levels"], model.nested["levels"][0]
    with pytest.raises(TraceError):
        trace(model, {"x": torch.ones(2, 4)})
    assert model.nested["levels"] is levels
    assert levels[0] is first
    assert first == []


def test_what_an_accepted_trace_counts_stays():
    def keep(module: Holder, x: torch.Tensor) -> torch.Tensor:
        module.settings.history.append("called")
        return x

    model = Holder(keep).eval()
    trace(model, {"x": torch.ones(2, 4)})
    assert set(model.settings.history) == {"called"}
