"""What was read while tracing a family of models is compared at the beginning of every run: nothing goes unnoticed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from helpers.changed_values import VALUES, ordinary, watched
from helpers.five_models import MODELS
from helpers.grown import attention, grow
from helpers.read_values import Beside, closing_over
from stepgraph.compiler.tracing.trace import trace


@pytest.fixture(autouse=True)
def _settings():
    yield
    ordinary()


def read_everything(model):
    """Put what reads every kind of value into the first attention of a model; returns its path."""
    path, layer = next((f"{path}.to_v", module) for path, module in model.named_modules() if hasattr(module, "to_v"))
    model.set_submodule(path, Beside(layer.to_v).eval().requires_grad_(False))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_value_is_noticed_within_the_families(name):
    make, example = MODELS[name]
    model = make()
    path = read_everything(model)
    recorded = trace(model, example()).facts
    unnoticed = []
    for kind, (change, changed) in VALUES.items():
        other = copy.deepcopy(model)
        # Copies share their functions.
        other.get_submodule(path).first.closed = closing_over(4)
        # Whose tensors these are is no matter here.
        held = {f"{path}.{layer}.held" for layer in ("first", "rest.0")}
        assert {found.path for found in recorded.differences(other)} <= held
        with pytest.MonkeyPatch.context() as patch:
            change(patch, other.get_submodule(path))
            found = [difference.path for difference in recorded.differences(other)]
        ordinary()
        unnoticed += [] if found and any(each.endswith(changed) for each in found) else [(kind, found)]
    assert unnoticed == []


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_fact_of_the_families_is_noticed(name, monkeypatch):
    make, example = MODELS[name]
    model = make()
    adapter = grow(model)
    _, watcher = watched(model, example())
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm))
    processor, registry = attention(model).processor, attention_dispatch._AttentionBackendRegistry
    changes = {
        "an active adapter": lambda patch: adapter.active.append("style"),
        "an attribute over None": lambda patch: patch.setattr(adapter, "active", None),
        "a layer's eps": lambda patch: patch.setattr(norm, "eps", 0.1),
        "a processor's attribute": lambda patch: patch.setattr(processor, "_attention_backend", "math", raising=False),
        "a processor": lambda patch: patch.setattr(attention(model), "processor", type("Other", (), {})()),
        "the dispatcher": lambda patch: patch.setattr(registry, "_active_backend", "other"),
        "its checks": lambda patch: patch.setattr(registry, "_checks_enabled", not registry._checks_enabled),
        "sdpa": lambda patch: patch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: None),
        "a setting of the process": lambda patch: torch.set_default_dtype(torch.float64),
        "a head count": lambda patch: patch.setattr(attention(model), "head_dim" if name == "flux" else "heads", 1),
        "a block's forward": lambda patch: patch.setattr(type(attention(model)), "forward", lambda *args, **kwargs: None),
    }
    for what, change in changes.items():
        with monkeypatch.context() as patch:
            change(patch)
            assert list(watcher.follow(model)) != [], what
        ordinary()
        adapter.active[:] = ["style"]
        assert list(watcher.follow(model)) == [], f"after {what}"
