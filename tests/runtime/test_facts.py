"""What was read while tracing is compared at the beginning of every run: nothing goes unnoticed, nothing else is refused."""

import argparse
import copy
import functools
import threading

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stepgraph as sg
from helpers import read_late, read_values
from helpers.five_models import MODELS, Grown, grow
from helpers.read_values import Beside, Mode, Processor, closing_over, doubled, tree
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.compiler.tracing import read_globals
from stepgraph.compiler.tracing.read_globals import Globals
from stepgraph.compiler.tracing.record_facts import Reads
from stepgraph.compiler.tracing.trace import trace
from stepgraph.errors import CompileError, MismatchError
from stepgraph.runtime.program import facts, process_state, watch
from stepgraph.runtime.program import freeze as freezing
from stepgraph.runtime.program.freeze import freeze
from stepgraph.runtime.program.watch import FactsWatch

precision = torch.get_float32_matmul_precision
X = {"x": torch.linspace(-1, 1, 12).reshape(2, 6)}


def watched(model, example):
    traced = trace(model, example)
    watcher = FactsWatch(traced.facts)
    assert list(watcher.differences(model)) == []
    return traced, watcher


def layer(name, value):
    return lambda monkeypatch, model: setattr(model.first, name, value)


def inside(reach, name, value):
    return lambda monkeypatch, model: monkeypatch.setattr(reach(model), name, value)


def entry(reach, key, value):
    return lambda monkeypatch, model: monkeypatch.setitem(reach(model), key, value)


def hook(monkeypatch, model):
    model.first.linear.register_forward_hook(lambda *_: None)


def ordinary():
    """Take back what no patch does."""
    torch.set_default_dtype(torch.float32)
    read_values.CONTEXT.set(0.5)


class Other(argparse.Namespace):
    pass


def other(x, shift=0.5, *, more=0.25):
    return x


VALUES = {
    "bool": (layer("flag", False), "first.flag"),
    "int": (layer("count", 3), "first.count"),
    "int that equals": (layer("count", 2.0), "first.count"),
    "float that is added": (layer("number", 1.25), "first.number"),
    "str": (layer("text", "gelu"), "first.text"),
    "None": (layer("nothing", 0), "first.nothing"),
    "enum": (layer("mode", Mode.DOUBLED), "first.mode"),
    "dtype": (layer("dtype_of", torch.float64), "first.dtype_of"),
    "size": (layer("size", torch.Size([3])), r"first.size[0]"),
    "slice": (layer("cut", slice(0, 3)), "first.cut"),
    "list": (lambda _, m: m.first.items.__setitem__(0, 5), "first.items[0]"),
    "longer list": (lambda _, m: m.first.items.append(5), "first.items[2]"),
    "tuple": (layer("pair", (3, 5)), "first.pair[1]"),
    "set": (lambda _, m: m.first.names.add("y"), "first.names"),
    "dict": (entry(lambda m: m.first.entries, "a", 7), "first.entries['a']"),
    "dict with more": (entry(lambda m: m.first.entries, "c", 7), "first.entries['c']"),
    "in a list of modules": (lambda _, m: setattr(m.rest[0], "count", 9), "rest.0.count"),
    "function": (layer("act", F.gelu), "first.act"),
    "argument of a partial": (layer("part", functools.partial(doubled, factor=4)), "first.part.keywords['factor']"),
    "closure": (layer("closed", closing_over(5)), "first.closed (number)"),
    "variable of a closure": (lambda _, m: setattr(m.first.closed.__closure__[0], "cell_contents", 6), "first.closed (number)"),
    "object": (inside(lambda m: m.first.options, "name", "b"), "first.options.name"),
    "nested in an object": (
        lambda _, m: m.first.options.nested["deep"].__setitem__(1, 2.5),
        "first.options.nested['deep'][1]",
    ),
    "class of an object": (inside(lambda m: type(m.first.options), "shift", 0.5), "first.options.shift"),
    "processor's number": (inside(lambda m: m.first.processor, "gain", 1.0), "first.processor.gain"),
    "processor's class": (inside(lambda m: Processor, "backend", "flash"), "first.processor.backend"),
    "processor's code": (inside(lambda m: Processor, "__call__", lambda self, layer, x: x), "Processor.__call__"),
    "class of a module": (inside(lambda m: type(m.first), "level", 2), "Layer.level"),
    "over the class": (layer("level", 2), "first.level"),
    "what was not there": (layer("extra", 1), "first.extra"),
    "tensor that is no buffer": (layer("held", torch.zeros(6)), "first.held"),
    "torch.nn's own": (lambda _, m: setattr(m.first.norm, "eps", 0.1), "first.norm.eps"),
    "global number": (inside(lambda m: read_values, "SCALE", 2.0), "helpers.read_values.SCALE"),
    "global dict": (entry(lambda m: read_values.TABLE, "bias", 1.0), "helpers.read_values.TABLE['bias']"),
    "global class": (inside(lambda m: read_values.Limits, "TOP", 0.1), "Limits.TOP"),
    "global function": (inside(lambda m: read_values, "helper", lambda x: x), "helpers.read_values.helper"),
    "function of torch": (inside(lambda m: F, "relu", F.gelu), "torch.nn.functional.relu"),
    "default dtype": (lambda patch, _: torch.set_default_dtype(torch.float64), "torch.get_default_dtype()"),
    "hook": (hook, "first.linear (forward hook 0)"),
    "replaced forward": (lambda _, m: setattr(m.first, "forward", lambda x: x), "first.forward"),
    "namespace": (lambda _, m: setattr(m.first.args, "shift", 1.0), "first.args.shift"),
    "slots": (lambda _, m: setattr(m.first.slotted, "shift", 1.0), "first.slotted.shift"),
    "user's dict": (lambda _, m: m.first.user.__setitem__("a", 1.0), "first.user.data['a']"),
    "key that begins with _": (entry(lambda m: m.first.private, "_a", 1.0), "first.private['_a']"),
    "dict behind a proxy": (entry(lambda m: read_values.BEHIND, "a", 1.0), "helpers.read_values.PROXY['a']"),
    "variable of a context": (lambda *_: read_values.CONTEXT.set(1.0), "helpers.read_values.CONTEXT.get()"),
    "in vars()": (layer("direct", 1.0), "first.direct"),
    "in __dict__": (layer("got", 1.0), "first.got"),
    "another dict of an object": (lambda _, m: setattr(m.first.options, "__dict__", {"name": "b"}), "first.options.name"),
    "another class of an object": (lambda _, m: setattr(m.first.args, "__class__", Other), "first.args"),
    "helper's method": (inside(lambda m: read_values.Helper, "moved", lambda self, x: x), "Helper.moved"),
    "helper's property": (inside(lambda m: read_values.Helper, "amount", 3), "Helper.amount"),
    "global of a helper's property": (inside(lambda m: read_values, "AMOUNT", 1.0), "helpers.read_values.AMOUNT"),
    "object of a helper's class": (inside(lambda m: read_values.Helper.inner, "gain", 1.0), "Helper.inner.gain"),
    "over a helper's class": (lambda _, m: setattr(m.first.helper, "inner", 1), "first.helper.inner"),
    "global of a function in a dict": (inside(lambda m: read_values, "IN_DICT", 1.0), "helpers.read_values.IN_DICT"),
    "function imported when it runs": (inside(lambda m: read_late, "late", lambda x: x), "helpers.read_late.late"),
    "global of that": (inside(lambda m: read_late, "LATE", 1.0), "helpers.read_late.LATE"),
    "default": (inside(lambda m: read_values.defaulted, "__defaults__", (1.0,)), "helpers.read_values.defaulted (default 0)"),
    "default by name": (
        entry(lambda m: read_values.defaulted.__kwdefaults__, "more", 1.0),
        "helpers.read_values.defaulted (default of more)",
    ),
    "code": (inside(lambda m: read_values.defaulted, "__code__", other.__code__), "helpers.read_values.defaulted"),
    "weight of a module in no tree": (
        entry(lambda m: read_values.HIDDEN[0]._parameters, "weight", torch.zeros(6, 6)),
        "a Linear in no module: weight",
    ),
    "before a buffer": (lambda _, m: vars(m.first).__setitem__("kept", torch.zeros(6)), "first.kept"),
    "forward of torch's": (inside(lambda m: torch.nn.LayerNorm, "forward", lambda self, x: x), "LayerNorm.forward"),
    "what torch's forward calls": (inside(lambda m: F, "layer_norm", lambda x, *_: x), "torch.nn.functional.layer_norm"),
    "method of tensors": (inside(lambda m: torch.Tensor, "clamp", lambda x, **_: x), "torch.Tensor.clamp"),
    "replaced submodule": (lambda _, m: setattr(m.first, "linear", torch.nn.Identity()), "first.linear"),
}


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
    before = watcher.differences(model)
    held = {f"{where}.held" for where in ("first", "rest.0")}
    assert {found.path for found in before} <= held
    change(monkeypatch, model)
    found = [found.path for found in watcher.differences(model)]
    assert path in found


@pytest.mark.parametrize("kind", ["list", "dict", "object", "global number", "hook", "class of a module", "torch.nn's own"])
def test_what_changes_under_a_watched_model_is_noticed(monkeypatch, kind):
    model = tree()
    _, watcher = watched(model, X)
    change, path = VALUES[kind]
    change(monkeypatch, model)
    assert path in [found.path for found in watcher.differences(model)]
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
            assert any(name in difference.path for difference in watcher.differences(model)), name
            assert not unasked.differences(plain)
        finally:
            change(before)
        assert not watcher.differences(model), name
    with torch.inference_mode():
        assert [difference.path.rpartition(" ")[2] for difference in watcher.differences(model)] == [
            "is_inference_mode_enabled"
        ]


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
    assert list(watcher.differences(model)) == []
    # Equal values in other objects are no difference either.
    model.first.items, model.first.entries, model.first.number = [1, 2], {"a": 1, "b": 2}, float("1.5")
    model.first.options = copy.deepcopy(model.first.options)
    assert list(watcher.differences(model)) == []
    model.first.items.append(3)
    assert [found.path for found in watcher.differences(model)] == ["first.items[2]"]


def test_not_a_number_is_itself():
    model = tree()
    model.first.items[0] = float("nan")
    _, watcher = watched(model, X)
    model.first.items[0] = float("inf") - float("inf")
    assert list(watcher.differences(model)) == []


def attention(model):
    return next(module for module in model.modules() if hasattr(module, "to_v"))


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
            assert list(watcher.differences(model)) != [], what
        ordinary()
        adapter.active[:] = ["style"]
        assert list(watcher.differences(model)) == [], f"after {what}"


def compiled(model, example, **options):
    plan = sg.make_plan("full", model=model, scheduler=tiny_scheduler("ddim"), steps=2, example_inputs=example)
    return sg.compile(model, plan, example, **{"backend": "eager", "exact": True, **options})


def test_a_strength_is_followed_and_what_decides_is_refused():
    model = tiny_dit()
    adapter, example = grow(model), inputs(batch=2)
    executable = compiled(model, example)

    def compare():
        with torch.no_grad():
            wanted = model(**example).sample
        assert torch.equal(executable.session()(**example).sample, wanted)
        return wanted

    first = compare()
    adapter.strength = 0.125
    assert not torch.equal(compare(), first)
    adapter.scales["style"] = 0
    compare()
    adapter.strength, adapter.scales["style"] = 0.5, 0.25
    assert torch.equal(compare(), first)
    adapter.active = []
    with pytest.raises(
        CompileError, match=r"to_v\.active\[0\] = 'style'.*now it is nothing.*Set it back, or detach, and compile"
    ):
        executable.session()(**example)
    adapter.active = ["style"]
    compare()
    adapter.strength = None
    with pytest.raises(CompileError, match=r"to_v\.strength = 0\.5.*now it is None"):
        executable.session()(**example)


def test_a_strength_is_as_much_a_value_that_was_measured_as_a_weight():
    model, example = tiny_dit(), inputs(batch=2)
    adapter, scheduler = grow(model), diffusers.DDIMScheduler(clip_sample=False)
    plans = {
        "numbers": sg.make_plan("whole-step", model=model, scheduler=scheduler, steps=2, samples=1),
        "choice": sg.make_plan("full", model=model, scheduler=scheduler, steps=2).with_header(measured="choice"),
    }
    fitted = sg.compile(model, plans["numbers"], example, backend="eager")
    strict = sg.compile(model, plans["choice"], example, backend="eager", strict=True)
    lenient = sg.compile(model, plans["choice"], example, backend="eager")
    for executable in (fitted, strict, lenient):
        executable.session()(**example)
    adapter.strength = 0.125
    for executable in (fitted, strict):
        # Not only the first time.
        for _ in range(2):
            with pytest.raises(MismatchError, match=r"to_v\.strength is 0\.125, and was 0\.5 when the plan was compiled"):
                executable.session()(**example)
    assert not lenient.weights.warned
    lenient.session()(**example)
    assert lenient.weights.warned
    adapter.strength = 0.5
    fitted.session()(**example)


def test_attaching_to_another_model_looks_at_its_values():
    model = tiny_dit()
    grow(model)
    executable = compiled(model, inputs(batch=2))
    other = copy.deepcopy(model)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8).eval()
    pipe = diffusers.DiTPipeline(other, vae, diffusers.DDIMScheduler())
    attention(other).to_v.active.append("style")
    with pytest.raises(CompileError, match=r"to_v\.active\[1\]"):
        executable.attach(pipe)
    attention(other).to_v.active.pop()
    executable.attach(pipe).detach()


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
        if not watcher.differences(model):
            assert torch.equal(graph(X["x"])[0], model(**X))
        for module, name, value in reversed(before):
            setattr(module, name, value)
        if "level" in vars(model.first):
            del model.first.level
        if "level" in vars(model.rest[0]):
            del model.rest[0].level
        assert list(watcher.differences(model)) == []
        assert torch.equal(graph(X["x"])[0], model(**X))


@pytest.mark.parametrize("options", [{"exact": False}, {"backend": "inductor", "exact": False}], ids=["hoisted", "inductor"])
def test_tables_and_regions_follow_strengths(options):
    model, example = tiny_dit(), inputs(batch=2)
    block = model.transformer_blocks[0].norm1
    # One that the tables depend on, and one in the loop.
    block.linear, adapter = Grown(block.linear).eval().requires_grad_(False), grow(model)
    executable = compiled(model, example, **options)
    for strength in (0.5, 0.125, 2.0):
        block.linear.strength = adapter.scales["style"] = strength
        with torch.no_grad():
            wanted = model(**example).sample
        torch.testing.assert_close(executable.session()(**example).sample, wanted, rtol=1e-4, atol=1e-5)
    assert {s.name for s in executable.default.facts.strengths} == {"strength", "scales"}


def test_an_export_has_the_strengths_of_its_time(tmp_path):
    model, example = tiny_dit(), inputs(batch=2)
    adapter = grow(model)
    executable = compiled(model, example)
    adapter.strength = 0.125
    executable.export(tmp_path / "exported", format="pt2")
    (constant,) = next(s for s in executable.default.facts.strengths if s.name == "strength").constants
    assert float(constant) == 0.125
    adapter.active.clear()
    with pytest.raises(CompileError, match=r"to_v\.active"):
        executable.export(tmp_path / "other", format="pt2")
