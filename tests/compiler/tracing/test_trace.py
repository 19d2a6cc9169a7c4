"""Tracing: exact on fresh inputs, with and without weights, and refusals that name the place."""

import dataclasses
import functools
import threading

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

import stepgraph as sg
from helpers.tiny import TINY, inputs, tiny_dit
from helpers.traced import Small, assert_exact, run_traced
from stepgraph.compiler.entry.load_model import load_model
from stepgraph.compiler.marking.traced_model import marked_graph
from stepgraph.compiler.tracing.trace import trace
from stepgraph.errors import TraceError
from stepgraph.inputs import flat_inputs, like_flat
from stepgraph.node_facts import SITE
from stepgraph.runtime.program.program import described, signature, zero_inputs

# -- DiT -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_dit_is_exact_on_fresh_inputs(dit, batch):
    traced = trace(dit, inputs(batch, seed=1, timestep=0))
    for seed, timestep in ((2, 999), (3, 17)):
        assert_exact(traced, dit, inputs(batch, seed, timestep))


def test_no_weight_is_baked_in(dit):
    other = tiny_dit(seed=5)
    assert_exact(trace(dit, inputs()), other, inputs(seed=4))


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_weight_free_trace_binds_to_the_real_model(where):
    with torch.device("meta") if where == "meta" else FakeTensorMode():
        hollow = diffusers.DiTTransformer2DModel(**TINY).eval()
    given = inputs(2) if where == "meta" else sg.example_inputs(hollow, 2)
    traced = trace(hollow, given)
    assert all(isinstance(value, FakeTensor) for value in traced.inputs.values())
    assert_exact(traced, tiny_dit(), inputs(2, seed=6))


@pytest.mark.slow
def test_full_size_dit_on_meta():
    with torch.device("meta"):
        model = load_model("dit-xl-2-256:random", device="meta")
    marked = marked_graph(model)
    kinds = [site.kind for site in marked.sites]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    assert counts == {"attn": 28, "ff": 28, "block": 28, "stack_residual": 1, "hidden": 1, "output": 1}
    # Two tiny models tell how many nodes a block takes and how many there are besides.
    two, three = (len(trace(tiny_dit(num_layers=layers), inputs()).graph.nodes) for layers in (2, 3))
    assert len(marked.trace.graph.nodes) == two + 26 * (three - two)
    modules = [node for node in marked.graph.nodes if node.op == "call_module"]
    assert sum(node.target.endswith("attn1.to_q") for node in modules) == 28
    # InvarDiff's code counts 0.11862 T for this model.
    assert marked.macs / 1e12 == pytest.approx(0.11866, abs=1e-5)


def test_nodes_know_shape_dtype_and_site(dit):
    marked = marked_graph(dit, inputs(3))
    for node in marked.graph.nodes:
        if node.op != "output":
            assert "val" in node.meta
    by_target = {node.target: node for node in marked.graph.nodes if node.op == "call_module"}
    value = by_target["transformer_blocks.1.ff.net.2"].meta["val"]
    assert (tuple(value.shape), value.dtype) == ((3, 16, 32), torch.float32)
    places = {
        "transformer_blocks.1.ff.net.2": "transformer_blocks.1.ff",
        "transformer_blocks.0.attn1.to_q": "transformer_blocks.0.attn1",
        "transformer_blocks.0.norm3": "transformer_blocks.0",
        "proj_out_2": None,
    }
    assert {target: by_target[target].meta.get(SITE) for target in places} == places


def test_inputs_are_untouched_and_torch_is_put_back(dit):
    call, given = nn.Module.__call__, inputs()
    before = {name: value.clone() for name, value in given.items()}
    trace(dit, given)
    assert nn.Module.__call__ is call
    assert all(torch.equal(given[name], before[name]) for name in given)


# -- small forwards that must work ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


pytree.register_dataclass(Pair)


def factories(m, x):
    ones = torch.ones(x.shape, dtype=x.dtype, device=x.device)
    return x + torch.arange(6, device=x.device) + torch.zeros(4, 6) + torch.full_like(x, 2.0) + ones + x.new_zeros(6)


def pieces(m, x):
    a, b = x.chunk(2, dim=-1)
    c, d, e = torch.split(x, [1, 2, 3], dim=-1)
    first, *rest = x.unbind(0)
    values, indices = x.max(dim=-1)
    return a * b, c.sum() + d.sum() * e.mean(), first + rest[-1], values, indices


def keywords(m, x):
    weight, bias = m.inner.weight, m.inner.bias
    return F.linear(input=x, weight=weight, bias=bias) + m.inner(input=x)


def properties(m, x):
    return x.T @ x, x.mT @ x, x.real


def held_tensors(m, x):
    return x * m.held + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) * m.scale


def twice(m, x):
    return m.inner(m.inner(x))


def in_place(m, x):
    y = x.clone()
    y += 1
    y.mul_(2).relu_()
    y[:, 1:3] = 7.0
    view = y[0]
    view.copy_(m.scale)
    y[1] -= 3
    return y


def selections(m, x):
    return torch.where(x > 0, x, -x).masked_fill(x > 1, 0.0), torch.einsum("bc,dc->bd", x, x), x[..., None, ::2]


def python_values(m, x):
    rows, columns = x.shape
    assert len(x) == rows == x.size(0) == x.shape[0]
    assert x.ndim == 2
    assert x.numel() == rows * columns
    side = int(rows**0.5)
    if x.dtype == torch.float32 and x.device.type == "cpu" and isinstance(x, torch.Tensor) and not x.requires_grad:
        x = x.reshape(side, side, columns).permute(2, 0, 1).flatten()
    return x * side + math_of(rows)


def math_of(n):
    return float(n) / 3


def nested(m, x):
    return {"pair": Pair(x + 1, x * 2), "list": [x, (x - 1, x.sum())]}


def numpy_numbers(m, x):
    return x * np.float32(0.5) + np.int64(3)


def mixed_precision(m, x):
    return x.to(torch.bfloat16).float() + F.layer_norm(x, (6,)), F.softmax(x.double(), dim=-1), 2 - x, 1 / (x * x + 1), -x


WORKING = [
    factories,
    pieces,
    keywords,
    properties,
    held_tensors,
    twice,
    in_place,
    selections,
    python_values,
    nested,
    numpy_numbers,
    mixed_precision,
]


@pytest.mark.parametrize("forward", WORKING, ids=lambda f: f.__name__)
def test_faithful_forwards(forward):
    torch.manual_seed(1)
    model = Small(forward).eval()
    traced = trace(model, {"x": torch.randn(4, 6)})
    for _ in range(2):
        assert_exact(traced, model, {"x": torch.randn(4, 6)})


def test_what_the_small_forwards_record():
    """Outputs keep their structure, constants are carried, and calls are numbered."""
    x = torch.randn(4, 6)
    model = Small(nested).eval()
    result = run_traced(trace(model, {"x": x}), model, {"x": x})
    assert isinstance(result["pair"], Pair)
    assert torch.equal(result["list"][1][0], x - 1)
    held = trace(Small(held_tensors).eval(), {"x": x})
    assert [tuple(value.shape) for value in held.constants.values()][:1] == [(6,)]
    called = trace(Small(twice).eval(), {"x": x})
    assert [number for path, number in called.calls if path == "inner"] == [0, 1]
    assert called.calls["inner", 1].inputs == called.calls["inner", 0].outputs


class Memo(nn.Module):
    """Keeps a table in a functools cache, as some rotary embeddings of diffusers do."""

    def forward(self, x):
        return x * self.table(x.shape[-1])

    @functools.cache  # noqa: B019
    def table(self, size):
        return torch.arange(size, dtype=torch.float32)


@pytest.mark.parametrize("called_before", [False, True])
def test_memoised_tables_survive_the_trace(called_before):
    model, x = Memo().eval(), torch.randn(2, 5)
    Memo.table.cache_clear()
    wanted = model(x) if called_before else x * torch.arange(5.0)
    traced = trace(model, {"x": x})
    assert torch.equal(traced.bind(model)(x)[0], wanted)
    assert torch.equal(model(x), wanted)


LEFT_BEHIND = {}


class Hoarder(nn.Module):
    """Keeps a tensor in a dictionary of its file."""

    def forward(self, x):
        LEFT_BEHIND["table"] = x * 2
        return LEFT_BEHIND["table"]


def test_a_tensor_left_outside_the_module_is_refused_and_taken_back():
    model, x = Hoarder().eval(), torch.randn(2, 5)
    with pytest.raises(TraceError, match="keeps this tensor outside its module"):
        trace(model, {"x": x})
    assert LEFT_BEHIND == {}
    assert torch.equal(model(x), x * 2)


class Tables(nn.Module):
    """Makes tables in its first call and keeps them: in a list of its own, and in its file."""

    def __init__(self):
        super().__init__()
        self.table, self.calls = None, 0

    def forward(self, x):
        if self.table is None:
            self.calls += 1
            self.table = [torch.arange(5.0), x.shape[1] * torch.ones(5)]
        return {"y": x * self.table[0] + self.table[1]}


def test_tables_of_a_first_call_are_made_before_the_trace():
    model, x = Tables().eval(), torch.randn(2, 5)
    traced = trace(model, {"x": x})
    assert model.calls == 1
    assert torch.equal(traced.bind(model)(x)[0], x * torch.arange(5.0) + 5)
    with pytest.raises(TraceError, match="changes its own"):
        trace(Tables().eval().to("meta"), {"x": x.to("meta")})


class Nested(nn.Module):
    def forward(self, x, tables, options):
        cos, (sin, factor) = tables
        return x[0] * cos + x[1] * sin * factor + options["more"][1]["shift"]


def test_tensors_inside_lists_tuples_and_dicts_are_inputs():
    def given():
        return {
            "x": [torch.randn(3), torch.randn(3)],
            "tables": (torch.randn(3), [torch.randn(3), 2]),
            "options": {"more": [None, {"shift": torch.randn(3)}], "name": "a"},
        }

    model = Nested().eval()
    traced = trace(model, given())
    names = ["x__0", "x__1", "tables__0", "tables__1__0", "options__more__1__shift"]
    assert list(traced.inputs) == names
    inputs = given()
    flat = flat_inputs(inputs)
    assert torch.equal(traced.bind(model)(*(flat[name] for name in names))[0], model(**inputs))
    assert flat_inputs(flat) == flat
    assert flat["tables__1__1"] == 2
    # Back to where they were, and as what was compiled for is kept without its tensors.
    assert pytree.tree_leaves(like_flat(given(), flat)) == pytree.tree_leaves(inputs)
    zeros = zero_inputs(described(inputs), torch.device("cpu"))
    assert pytree.tree_structure(zeros) == pytree.tree_structure(inputs)
    assert torch.equal(zeros["options"]["more"][1]["shift"], torch.zeros(3))
    assert signature(zeros) == signature(inputs)


def test_a_leaf_with_a_forward_of_its_own_is_traced():
    # Hooks of other libraries replace the forward of a layer by a function bound to the real layer.
    model, given = tiny_dit(), inputs()
    linear = model.transformer_blocks[0].ff.net[2]
    own = linear.forward
    linear.forward = lambda *args: own(*args) * 2
    with torch.no_grad():
        wanted = model(**given).sample
    assert torch.equal(trace(model, given).bind(model)(**given)[0], wanted)


def test_another_thread_runs_the_model_while_it_is_traced():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

        def forward(self, x):
            if threading.current_thread() is threading.main_thread():
                tracing.set()
                answered.wait(30)
            return self.linear(x) * self.scale

    tracing, answered, seen = threading.Event(), threading.Event(), []
    model, x = Slow().eval(), torch.randn(2, 4)

    def serve():
        tracing.wait(30)
        try:
            with torch.no_grad():
                seen.append(model(x))
        finally:
            answered.set()

    thread = threading.Thread(target=serve)
    thread.start()
    traced = trace(model, {"x": x})
    thread.join()
    with torch.no_grad():
        wanted = model.linear(x) * model.scale
    assert len(seen) == 1
    assert type(seen[0]) is torch.Tensor
    assert torch.equal(seen[0], wanted)
    assert torch.equal(traced.bind(model)(x)[0], wanted)


def test_a_thread_that_runs_the_model_all_the_while_sees_nothing_of_a_trace():
    model, given, failures, done = tiny_dit(), inputs(), [], threading.Event()
    with torch.no_grad():
        wanted = model(**given).sample

    def serve():
        with torch.no_grad():
            while not done.is_set():
                try:
                    if not torch.equal(model(**given).sample, wanted):
                        failures.append("another result")
                except Exception as error:
                    failures.append(repr(error))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(4):
            traced = trace(model, given)
    finally:
        done.set()
        thread.join()
    assert failures == []
    assert torch.equal(traced.bind(model)(**given)[0], wanted)


@pytest.mark.parametrize("surroundings", [torch.inference_mode, functools.partial(torch.autocast, "cpu", torch.bfloat16)])
def test_a_trace_does_not_depend_on_where_it_is_made(surroundings):
    model, plain = tiny_dit(), inputs()
    expected = trace(model, plain)
    with surroundings():
        traced = trace(model, inputs())
    dtypes = [[getattr(node.meta.get("val"), "dtype", None) for node in t.graph.nodes] for t in (expected, traced)]
    assert dtypes[0] == dtypes[1]
    with torch.no_grad():
        assert torch.equal(traced.bind(model)(**plain)[0], model(**plain).sample)
