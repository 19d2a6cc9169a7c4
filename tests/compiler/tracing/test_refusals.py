"""Refusals of the tracer: what a static graph cannot carry is named by file and line, and never baked in."""

import contextlib
import random
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny import inputs, tiny_dit
from helpers.traced import Small, assert_exact
from stepgraph.compiler.tracing.trace import trace
from stepgraph.errors import TraceError


def data_dependent_if(m, x):
    if x.sum() > 0:  # here
        return x
    return -x


def item(m, x):
    return x * x.max().item()  # here


def boolean_index(m, x):
    return x[x > 0]  # here


def nonzero(m, x):
    return x.nonzero()  # here


def to_numpy(m, x):
    return torch.from_numpy(x.numpy())  # here


def to_list(m, x):
    return x * x.tolist()[0][0]  # here


def to_float(m, x):
    return x * float(x[0, 0])  # here


def write_buffer(m, x):
    m.scale.add_(1)  # here
    return x * m.scale


def write_parameter(m, x):
    m.inner.weight.data.mul_(2)  # here
    return m.inner(x)


def write_view_of_buffer(m, x):
    m.scale[:2] = 0  # here
    return x * m.scale


def write_held_tensor(m, x):
    m.held.add_(1)  # here
    return x * m.held


WRITES = {
    write_buffer: "'scale'",
    write_parameter: "'inner.weight'",
    write_view_of_buffer: "'scale'",
    write_held_tensor: "a tensor that it holds",
}
NEEDS_DATA = [data_dependent_if, item, boolean_index, nonzero, to_numpy, to_list, to_float]


def line_of(forward) -> str:
    """ "file:line" of the line that says `# here`."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    start = forward.__code__.co_firstlineno
    return f"{Path(__file__).name}:{next(n for n in range(start, start + 9) if '# here' in lines[n - 1])}"


@pytest.mark.parametrize("forward", NEEDS_DATA, ids=lambda f: f.__name__)
def test_what_needs_data_is_refused_by_file_and_line(forward):
    with pytest.raises(TraceError, match=r"depends on data|past torch's function protocol") as caught:
        trace(Small(forward).eval(), {"x": torch.randn(4, 6)})
    assert line_of(forward) in str(caught.value)


@pytest.mark.parametrize("forward", WRITES, ids=lambda f: f.__name__)
def test_a_forward_that_writes_to_its_own_tensors_is_refused(forward):
    with pytest.raises(TraceError, match="a later call would depend on an earlier one") as caught:
        trace(Small(forward).eval(), {"x": torch.randn(4, 6)})
    assert line_of(forward) in str(caught.value)
    assert WRITES[forward] in str(caught.value)


class Counting(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.linear, self.change = nn.Linear(6, 6), change
        self.calls, self.log = 0, []
        self.register_buffer("kept", torch.zeros(4, 6))

    def forward(self, x):
        match self.change:
            case "calls":
                self.calls += 1
            case "log":
                self.log.append(1)
            case "kept":
                self.kept = x
        return self.linear(x)


@pytest.mark.parametrize("change", ["calls", "log", "kept"])
def test_a_forward_that_changes_its_own_state_is_refused(change):
    model = Counting(change).eval()
    kept = model.kept
    with pytest.raises(TraceError, match=rf"test_refusals\.py:\d+.*changes its own '{change}'"):
        trace(model, {"x": torch.randn(4, 6)})
    # It was called once, to see whether it makes a table in its first call alone.
    assert (model.calls, model.log, model.kept is kept) == (0, [], True)


@pytest.mark.parametrize(
    ("part", "name"), [("", "DiTTransformer2DModel"), ("transformer_blocks.1.ff", "transformer_blocks.1.ff")]
)
def test_training_mode_is_refused(part, name):
    model = tiny_dit()
    model.get_submodule(part).train()
    with pytest.raises(TraceError, match=rf"^{name} is in training mode.*call model\.eval\(\)"):
        trace(model, inputs())


class Pair(NamedTuple):
    one: torch.Tensor
    other: int


@pytest.mark.parametrize("nested", [Pair(torch.ones(6), 1), {0: torch.ones(6)}, deque([torch.ones(6)])])
def test_tensors_inside_other_inputs_are_refused(nested):
    model = Small(lambda m, x: x).eval()
    with pytest.raises(TraceError, match=f"the input extra holds tensors inside a {type(nested).__name__}"):
        trace(model, {"x": torch.randn(4, 6), "extra": nested})


@pytest.mark.parametrize(("extra", "name"), [(3, "int"), ("text", "str")])
def test_other_outputs_than_tensors_are_refused(extra, name):
    with pytest.raises(TraceError, match=f"Small returns {name} beside tensors"):
        trace(Small(lambda m, x: (x, extra)).eval(), {"x": torch.randn(4, 6)})


def test_a_failed_trace_leaves_nothing_behind(dit):
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    with pytest.raises(TraceError):
        trace(Small(item).eval(), {"x": torch.randn(4, 6)})
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, getattribute)
    assert_exact(trace(dit, inputs()), dit, inputs(seed=9))


def test_errors_of_the_model_itself_come_through():
    with pytest.raises(RuntimeError, match="must have same reduction dim"):
        trace(Small(lambda m, x: x @ x).eval(), {"x": torch.randn(4, 6)})


COUNTS = {"class": 0}


def count_globally(m, x):
    COUNTS["class"] += 1
    return x * COUNTS["class"]


def draw_a_number(m, x):
    return x * random.random()


@pytest.mark.parametrize("forward", [count_globally, draw_a_number], ids=lambda f: f.__name__)
def test_what_two_traces_do_differently_is_refused(forward):
    with pytest.raises(TraceError, match=r"traced twice, the forward did .* neither an input nor a weight") as caught:
        trace(Small(forward).eval(), {"x": torch.randn(4, 6)})
    assert __file__ in str(caught.value)


def switch_autocast_on(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.inner(x)


def hand_a_generator(m, x):
    return x + torch.randn(6, generator=torch.Generator().manual_seed(0))


def assign_data(m, x):
    y = m.inner(x)
    y.data = y * 2
    return y


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (assign_data, "assigning to a tensor's .data"),
        (switch_autocast_on, "switches autocast on"),
        (hand_a_generator, "a Generator cannot be an argument"),
    ],
)
def test_what_else_cannot_be_traced_is_named_by_file_and_line(forward, said):
    with pytest.raises(TraceError, match=said) as caught:
        trace(Small(forward).eval(), {"x": torch.randn(4, 6)})
    first = forward.__code__.co_firstlineno
    assert any(f"{__file__}:{line}" in str(caught.value) for line in range(first, first + 4))


def test_a_constant_that_changes_is_refused():
    with pytest.raises(TraceError, match=r"other values of a .6. constant"):
        trace(Small(lambda m, x: x * torch.from_numpy(np.random.rand(6))).eval(), {"x": torch.randn(4, 6)})


def test_a_counting_hook_on_a_layer_is_refused():
    model = Small(lambda m, x: m.inner(x)).eval()

    def count(module, args, out):
        module.seen = getattr(module, "seen", 0) + 1
        return out * module.seen

    model.inner.register_forward_hook(count)
    with pytest.raises(TraceError, match="calling inner changes its own 'seen'"):
        trace(model, {"x": torch.randn(4, 6)})


class Prompted(nn.Module):
    """Passes a view of one of its parameters to a module, as learned queries are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.inner = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(self.queries[None])


def test_views_of_parameters_that_train_are_passed_to_modules():
    model, x = Prompted().eval(), torch.ones(2, 3, 4)
    with torch.no_grad():
        assert torch.equal(trace(model, {"x": x}).bind(model)(x)[0], model(x))


def test_a_table_without_data_beside_the_buffers_is_refused():
    with torch.device("meta"):
        model = Prompted().eval()
        model.table = torch.ones(4)
    model.forward = lambda x: x + model.table
    with pytest.raises(TraceError, match="a tensor without data that is neither a parameter nor a registered buffer"):
        trace(model, {"x": torch.ones(2, 3, 4, device="meta")})


def caught(m, x):
    try:
        return x * x.max().item()
    except Exception:
        return x


def suppressed(m, x):
    with contextlib.suppress(RuntimeError):
        if (x > 0).any():
            x = x * 2
    return x * 1


def returned_in_finally(m, x):
    try:
        scale = float(x.mean())
    finally:
        return x * locals().get("scale", 5.0)  # noqa: B012


def caught_for_good(m, x):
    try:
        return x * torch.tensor(x.tolist()).sum()
    except BaseException:
        return x


def address(m, x):
    return x * (x.data_ptr() % 7)


def no_such_product(m, x):
    try:
        return x @ x
    except RuntimeError:
        return x


@pytest.mark.parametrize(
    "forward", [caught, suppressed, returned_in_finally, caught_for_good, address, no_such_product], ids=lambda f: f.__name__
)
def test_a_refusal_that_the_forward_catches_is_one(forward):
    with pytest.raises(TraceError) as refused:
        trace(Small(forward).eval(), {"x": torch.rand(4, 6)})
    assert ("test_refusals.py" in str(refused.value)) == (forward is not no_such_product)


def test_a_tensor_says_that_it_is_one():
    def forward(m, x):
        return x * 2 if x.__class__ is torch.Tensor and isinstance(x, torch.Tensor) else x * 3

    model, x = Small(forward).eval(), torch.rand(4, 6)
    assert_exact(trace(model, {"x": x}), model, {"x": x})
