"""The checks of single values: what they take, and how they word what they refuse."""

import math
import re

import pytest
import torch
from torch import nn

from stepgraph.checks import check_flag, check_number, check_numbers, check_whole, is_number, is_whole, shown
from stepgraph.errors import ArgumentError


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 2**63])
def test_what_is_no_whole_number(value):
    assert not is_whole(value)
    with pytest.raises(ArgumentError, match=f"^n is {value!r}; expected a whole number of at least 0$"):
        check_whole("n", value)


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, -math.inf, 10**400])
def test_what_is_no_finite_number(value):
    assert not is_number(value)
    with pytest.raises(ArgumentError, match=f"^x is {shown(value)}; expected a number of at least 0$"):
        check_number("x", value)


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_what_is_no_flag(value):
    with pytest.raises(ArgumentError, match=f"^f is {value!r}; expected True or False$"):
        check_flag("f", value)


def test_values_are_shown_shortly():
    assert shown(10**400) == "a number of about 400 digits"
    assert shown(torch.zeros(2, 3)) == "a float32 tensor [2, 3]"
    assert shown([torch.zeros(1)] * 9) == "[" + "a float32 tensor [1], " * 4 + "...]"
    assert shown("x" * 500) == "'" + "x" * 116 + "..."
    assert shown(nn.Linear(1, 1)) == "a Linear"


def test_what_is_taken():
    check_flag("f", False)
    check_whole("n", 3, 1, 3)
    check_number("x", -1.5, -math.inf)
    check_number("x", 1, above=0, most=1)
    assert check_numbers("xs", [1, 2.5]) == [1.0, 2.5]


BOUNDS = {
    "in 0..1": ({"least": 0, "most": 1}, [-0.1, 1.1]),
    "of at least 2": ({"least": 2}, [1]),
    "at most 4": ({"least": -math.inf, "most": 4}, [4.5]),
    "above 0": ({"above": 0}, [0, -1]),
    "above 0 and at most 1": ({"above": 0, "most": 1}, [0, 1.5]),
    "above 0 and below 1": ({"above": 0, "below": 1}, [0, 1]),
    "below 1": ({"least": -math.inf, "below": 1}, [1]),
}


@pytest.mark.parametrize("words", BOUNDS)
def test_bounds_in_words(words):
    bounds, outside = BOUNDS[words]
    for value in outside:
        with pytest.raises(ArgumentError, match=f"^x is {value!r}; expected a number {re.escape(words)}$"):
            check_number("x", value, **bounds)


def test_where_what_and_why():
    with pytest.raises(ArgumentError, match=r"^n is 0 of ff; expected a whole number of at least 1, because$"):
        check_whole("n", 0, 1, where=" of ff", tail=", because")
    with pytest.raises(ValueError, match=r"^x is -1; expected megabytes of at least 0, or None$") as caught:
        check_number("x", -1, what="megabytes", tail=", or None", error=ValueError)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("values", [[], None, "12", [[1.0]]])
def test_what_is_no_list_of_numbers(values):
    with pytest.raises(ArgumentError, match="xs"):
        check_numbers("xs", values)
