"""Errors of a forward while it is traced: the user's own pass as they are, those of tracing become TraceErrors."""

import json
import sys
from pathlib import Path

import pytest
import torch

from helpers.traced import Small
from stepgraph.compiler.tracing.trace import trace
from stepgraph.errors import TraceError


class UnknownError(Exception):
    """What no code of ours knows."""


def raise_one(m, x):
    raise UnknownError("of the user")  # here


def raise_a_runtime_error(m, x):
    raise RuntimeError("of the user")  # here


def fail_in_python(m, x):
    return x + [1, 2][len(x)]  # here


def fail_in_the_standard_library(m, x):
    return x * json.loads("{")  # here


def raise_again(m, x):
    try:
        return m.inner(x) * {}["nothing"]
    except KeyError as error:
        raise UnknownError("of the user") from error  # here


def assert_with_torch(m, x):
    torch._assert(x.shape[0] == 99, "of the user")  # here
    return x


def check_with_torch(m, x):
    torch._check(x.shape[0] == 99, lambda: "of the user")  # here
    return x


def ask_for_what_is_missing(m, x):
    return m.missing(x)  # here


def speak_of_stand_ins(m, x):
    raise ValueError("TracedTensor is a word of the user's")  # here


def recur(m, x):
    return recur(m, x)  # here


OWN = {assert_with_torch: AssertionError, check_with_torch: RuntimeError, ask_for_what_is_missing: AttributeError,
       speak_of_stand_ins: ValueError, recur: RecursionError,
       raise_one: UnknownError, raise_a_runtime_error: RuntimeError, fail_in_python: IndexError,
       fail_in_the_standard_library: json.JSONDecodeError, raise_again: UnknownError}  # fmt: skip


def line_of(forward):
    """ "file:line" of the line that says `# here`."""
    lines, first = Path(__file__).read_text(encoding="utf-8").splitlines(), forward.__code__.co_firstlineno
    return f"{__file__}:{next(n for n in range(first, first + 9) if '# here' in lines[n - 1])}"


@pytest.mark.parametrize("forward", OWN, ids=lambda f: f.__name__)
def test_the_users_own_error_passes_as_it_is(forward):
    model = Small(forward).eval()
    with pytest.raises(OWN[forward]) as eager:
        model(torch.randn(4, 6))
    with pytest.raises(OWN[forward]) as caught:
        trace(model, {"x": torch.randn(4, 6)})
    assert type(caught.value) is type(eager.value)
    assert str(caught.value) == str(eager.value)
    assert type(caught.value.__cause__) is type(eager.value.__cause__)
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert note.startswith(f"{line_of(forward)}: stepgraph traced the model's forward")


def ask_for_values(m, x):
    if x.sum() > 0:
        return x
    raise UnknownError("of the user")


def answer_for_values(m, x):
    try:
        return x * x.max().item()
    except RuntimeError as error:
        raise UnknownError("of the user") from error


def fail_in_torch(m, x):
    return x @ x


def fail_without_a_value(m, x):
    return x * [1, 2][x]


def call_an_extension(m, x):
    return torch._C._nn.gelu(x, approximate="nothing")


TRACING = [ask_for_values, answer_for_values, fail_in_torch, fail_without_a_value, call_an_extension]


class UnreadableError(Exception):
    """One that fails when it is asked for its text."""

    def __str__(self):
        return str(1 // 0)


def raise_unreadable(m, x):
    raise UnreadableError("of the user")


def test_an_error_that_cannot_be_read_passes_as_it_is():
    with pytest.raises(UnreadableError) as caught:
        trace(Small(raise_unreadable).eval(), {"x": torch.randn(4, 6)})
    assert caught.value.args == ("of the user",)


def say_the_class(m, x):
    if type(x) is not torch.Tensor:
        raise TypeError(f"x is a {type(x).__name__}")
    return x


def assert_of_values(m, x):
    torch._assert(x.sum() > 0, "of the user")
    return x


@pytest.mark.parametrize("forward", [say_the_class, assert_of_values])
def test_what_only_a_trace_meets_is_no_error_of_the_users(forward):
    with pytest.raises(TraceError):
        trace(Small(forward).eval(), {"x": torch.ones(4, 6)})


@pytest.mark.parametrize("forward", TRACING, ids=lambda f: f.__name__)
def test_errors_of_tracing_and_of_torch_stay_refusals(forward):
    first = forward.__code__.co_firstlineno
    with pytest.raises(TraceError) as caught:
        trace(Small(forward).eval(), {"x": torch.randn(4, 6)})
    assert any(f"{__file__}:{line}" in str(caught.value) for line in range(first, first + 5))


def keep_and_raise(m, x):
    m.log.append(x * 2)
    raise UnknownError("of the user")


def test_the_trace_before_a_users_error_leaves_nothing_behind():
    model = Small(keep_and_raise).eval()
    with pytest.raises(UnknownError):
        trace(model, {"x": torch.randn(4, 6)})
    assert model.log == []


class Scaled(Small):
    """Takes no number but a plain one, which a strength is not while it is followed."""

    strength = 0.5

    def forward(self, x):
        if type(self.strength) is not float:
            raise UnknownError("no number")
        return x * self.strength


def test_an_error_over_what_stands_in_for_a_number_is_traced_without():
    model, x = Scaled(None).eval(), torch.randn(4, 6)
    assert torch.equal(trace(model, {"x": x}).bind(model)(x)[0], x * 0.5)
