"""Checks of single values, with one wording for all of them.

A message names the value, where it was given, what was expected, and (in `tail`) why or what to do:
`rank is 0 of ff; expected a whole number of at least 1, because ...`. True and false are no numbers here.
"""

import math
import sys
from typing import Any

import numpy as np
import torch

from stepgraph.errors import ArgumentError

# Counts above this are not real, and would not survive as floating-point numbers.
LARGEST = 2**63 - 1


def is_whole(value: Any, least: int = -LARGEST, most: int = LARGEST) -> bool:
    """Whether a value is a whole number in least..most."""
    return type(value) is int and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether a value is a finite number. The comparison takes whole numbers of any length, and no NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_flag(name: str, value: Any, *, tail: str = "", error: type[Exception] = ArgumentError) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise error(f"{name} is {value!r}; expected True or False{tail}")


def check_whole(
    name: str,
    value: Any,
    least: int = 0,
    most: int | None = None,
    *,
    where: str = "",
    tail: str = "",
    error: type[Exception] = ArgumentError,
) -> None:
    """Refuse what is not a whole number in least..most."""
    if not is_whole(value, least, LARGEST if most is None else most):
        wanted = f"of at least {least}" if most is None else f"in {least}..{most}"
        raise error(f"{name} is {value!r}{where}; expected a whole number {wanted}{tail}")


def check_number(
    name: str,
    value: Any,
    least: float = 0,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    what: str = "a number",
    where: str = "",
    tail: str = "",
    error: type[Exception] = ArgumentError,
) -> None:
    """Refuse what is not a finite number in least..most, or, of the bounds that exclude themselves, above..below.

    `what` is what errors call the number expected: a share, a probability, megabytes.
    """
    if above > -math.inf:
        least = above
    if not is_number(value) or not least <= value <= most or not above < value < below:
        raise error(f"{name} is {value!r}{where}; expected {what}{_bounds(least, most, above, below)}{tail}")


def _bounds(least: float, most: float, above: float, below: float) -> str:
    """In words, with a blank before them; nothing where there are none."""
    if above == -math.inf < least and most < math.inf:
        return f" in {least:g}..{most:g}"
    lower = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
    upper = f" below {below:g}" if below < math.inf else f" at most {most:g}" if most < math.inf else ""
    return f"{lower} and{upper}" if lower and upper else lower + upper


def check_numbers(name: str, values: Any) -> list[float]:
    """A list (or vector) of finite numbers as floats."""
    listed = values.tolist() if isinstance(values, (torch.Tensor, np.ndarray)) else values
    if not isinstance(listed, (list, tuple)) or not listed:
        raise ArgumentError(f"{name} is {values!r}; expected a list of numbers")
    for i, value in enumerate(listed):
        check_number(f"{name}[{i}]", value, least=-math.inf, what="a number that is finite")
    return [float(value) for value in listed]
