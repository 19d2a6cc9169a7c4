"""What was read while tracing is compared at the beginning of every run: nothing goes unnoticed, nothing else is refused."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.changed_values import VALUES, ordinary, watched
from helpers.read_values import Mode, tree
from stepgraph.compiler.tracing import read_globals
from stepgraph.compiler.tracing.read_globals import Globals
from stepgraph.compiler.tracing.record_facts import Reads
from stepgraph.compiler.tracing.trace import trace
from stepgraph.runtime.program import facts, process_state, watch
from stepgraph.runtime.program import freeze as freezing
from stepgraph.runtime.program.freeze import freeze
from stepgraph.runtime.program.watch import FactsWatch

precision = torch.get_float32_matmul_precision
X = {"x": torch.linspace(-1, 1, 12).reshape(2, 6)}


@pytest.fixture(scope="module")
def traced_tree():
    return trace(tree(), X).facts


@pytest.fixture(autouse=True)
def _settings():
    yield
    ordinary()


@pytest.mark.parametrize("kind", VALUES)
def test_every_kind_of_value_is_noticed(monkeypatch, traced_tree, kind):
    change, path = VALUES[kind]
    # The facts of a tree hold for another one of the same make, but for whose tensors these are.
    model = tree()
    watcher = FactsWatch(traced_tree)
    before = watcher.follow(model)
    held = {f"{where}.held" for where in ("first", "rest.0")}
    assert {found.path for found in before} <= held
    change(monkeypatch, model)
    found = [found.path for found in watcher.follow(model)]
    assert path in found


@pytest.mark.parametrize("kind", ["list", "dict", "object", "global number", "hook", "class of a module", "torch.nn's own"])
def test_what_changes_under_a_watched_model_is_noticed(monkeypatch, kind):
    model = tree()
    _, watcher = watched(model, X)
    change, path = VALUES[kind]
    change(monkeypatch, model)
    assert path in [found.path for found in watcher.follow(model)]
    monkeypatch.undo()


def test_a_snapshot_and_the_full_comparison_notice_the_same(monkeypatch):
    """The cheap comparison of objects may find too much, and never less than the one of values."""
    for kind, (change, _) in VALUES.items():
        model = tree()
        with monkeypatch.context() as patch:
            snapshot = watch._Snapshot(model, trace_of(model))
            assert snapshot.holds()
            change(patch, model)
            assert not snapshot.holds(), kind
        ordinary()


_facts = {}


def trace_of(model):
    """The facts of a tree, of whose tensors these are no matter."""
    if "tree" not in _facts:
        _facts["tree"] = trace(model, X).facts
    return _facts["tree"]


class Asks(torch.nn.Module):
    def forward(self, x):
        import threading

        answers = (
            precision() == "highest",
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_num_threads() == 2,
            torch.is_inference_mode_enabled(),
            threading.current_thread().name == "another",
        )
        return x * (1 + sum(2**place for place, answer in enumerate(answers) if answer))


SETTERS = {
    "get_float32_matmul_precision": (torch.set_float32_matmul_precision, ("high", "highest")),
    "are_deterministic_algorithms_enabled": (torch.use_deterministic_algorithms, (True, False)),
    "flash_sdp_enabled": (torch.backends.cuda.enable_flash_sdp, (True, False)),
    "allow_tf32": (lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on), (True, False)),
    "get_num_threads": (torch.set_num_threads, (1, 2)),
    "current_thread": (lambda name: setattr(threading.current_thread(), "name", name), ("MainThread", "another")),
}


def test_settings_that_the_forward_asks_for_are_noticed():
    model, plain = Asks().eval(), torch.nn.Sequential(torch.nn.Identity()).eval()
    (_, watcher), (_, unasked) = watched(model, X), watched(plain, {"input": X["x"]})
    for name, (change, (first, second)) in SETTERS.items():
        before = process_state.ASKED[name]()
        before = before[0] if isinstance(before, tuple) else before
        other = second if before == first else first
        try:
            change(other)
            assert any(name in difference.path for difference in watcher.follow(model)), name
            assert not unasked.follow(plain)
        finally:
            change(before)
        assert not watcher.follow(model), name
    with torch.inference_mode():
        assert [difference.path.rpartition(" ")[2] for difference in watcher.follow(model)] == ["is_inference_mode_enabled"]


def test_what_the_forward_does_not_read_may_change():
    model = tree()
    _, watcher = watched(model, X)
    model.first.unread = 2.0
    model.first.new_one = "never asked for"
    model.rest[0].linear.in_features = 7
    model.zero_grad()
    model.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model.first.linear.weight.mul_(2)
    model.train()
    assert list(watcher.follow(model)) == []
    # Equal values in other objects are no difference either.
    model.first.items, model.first.entries, model.first.number = [1, 2], {"a": 1, "b": 2}, float("1.5")
    model.first.options = copy.deepcopy(model.first.options)
    assert list(watcher.follow(model)) == []
    model.first.items.append(3)
    assert [found.path for found in watcher.follow(model)] == ["first.items[2]"]


def test_not_a_number_is_itself():
    model = tree()
    model.first.items[0] = float("nan")
    _, watcher = watched(model, X)
    model.first.items[0] = float("inf") - float("inf")
    assert list(watcher.follow(model)) == []


RECORDERS = {
    "attributes": (Reads, "read", lambda self, module, name, value: value, "int"),
    "absent attributes": (Reads, "note_absent", lambda self, module, name: None, "what was not there"),
    "classes": (Reads, "_of_class", lambda self, kind, name: None, "class of a module"),
    "globals": (Globals, "add_code", lambda self, code, space: None, "global number"),
    "imports": (read_globals, "_imports", lambda code, space: (), "function imported when it runs"),
    "classes of objects": (Globals, "_of_kind", lambda self, kind, made: (), "helper's method"),
    "functions in values": (Globals, "frozen", lambda self, value: freeze(value), "global of a helper's property"),
    "dicts of attributes": (Reads, "_all", lambda self, module, attributes: attributes, "in vars()"),
    "modules in no tree": (Reads, "_of_other", lambda self, module, name, attributes: None, "weight of a module in no tree"),
    "torch's own forwards": (Reads, "_of_leaf", lambda self, kind: None, "what torch's forward calls"),
    "attributes of objects": (freezing, "_attributes", lambda value, containers: (), "slots"),
    "hidden tensors": (facts, "shadows_of", lambda module: (), "before a buffer"),
    "process": (facts, "process_state", dict, "default dtype"),
    "hooks": (facts, "hooks_of", lambda module: (), "hook"),
    "forwards": (facts, "forward_of", lambda module, containers=None: facts.NOTHING, "replaced forward"),
}


@pytest.mark.parametrize("name", RECORDERS)
def test_each_recorder_is_what_notices(monkeypatch, name):
    owner, function, nothing, kind = RECORDERS[name]
    monkeypatch.setattr(owner, function, nothing)
    model = tree()
    recorded = trace(model, X).facts
    monkeypatch.undo()
    if name in ("hooks", "forwards", "process", "attributes of objects", "hidden tensors"):
        monkeypatch.setattr(owner, function, nothing)
    with monkeypatch.context() as patch:
        VALUES[kind][0](patch, model)
        assert VALUES[kind][1] not in [found.path for found in recorded.differences(model)]


# Of the attributes that the forward reads, and values that they may get.
MUTATIONS = st.tuples(
    st.sampled_from(["first", "rest.0"]),
    st.one_of(
        st.tuples(st.just("flag"), st.booleans()),
        st.tuples(st.sampled_from(["count", "level"]), st.integers(-2, 2)),
        st.tuples(st.sampled_from(["number", "strength"]), st.floats(-2, 2, width=16)),
        st.tuples(st.sampled_from(["text", "nothing"]), st.sampled_from(["relu", None, ""])),
        st.tuples(st.just("mode"), st.sampled_from(Mode)),
        st.tuples(st.just("items"), st.lists(st.integers(0, 2), min_size=1, max_size=2)),
        st.tuples(st.just("scaling"), st.fixed_dictionaries({"one": st.floats(-1, 1, width=16)})),
        st.tuples(st.just("act"), st.sampled_from([F.silu, F.gelu, torch.tanh])),
        st.tuples(st.just("unread"), st.integers()),
    ),
)


@pytest.fixture(scope="module")
def bound_tree():
    model = tree()
    traced, watcher = watched(model, X)
    return model, traced.bind(model), watcher


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(MUTATIONS, max_size=3))
def test_a_graph_is_right_or_refused(bound_tree, changes):
    model, graph, watcher = bound_tree
    before = [(model.get_submodule(path), name, getattr(model.get_submodule(path), name)) for path, (name, _) in changes]
    for path, (name, value) in changes:
        setattr(model.get_submodule(path), name, value)
    with torch.no_grad():
        if not watcher.follow(model):
            assert torch.equal(graph(X["x"])[0], model(**X))
        for module, name, value in reversed(before):
            setattr(module, name, value)
        if "level" in vars(model.first):
            del model.first.level
        if "level" in vars(model.rest[0]):
            del model.rest[0].level
        assert list(watcher.follow(model)) == []
        assert torch.equal(graph(X["x"])[0], model(**X))
