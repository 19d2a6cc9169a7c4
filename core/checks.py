"""Checks of single values, with one wording for all of them."""

import math
from typing import Any

import numpy as np
import torch

from stepgraph.errors import ArgumentError

# Counts above this are not real, and would not survive as floating-point numbers.
LARGEST = 2**63 - 1


def check_whole(name: str, value: Any, least: int = 0, most: int | None = None, where: str = "") -> None:
    """Refuse what is not a whole number in least..most."""
    if type(value) is not int or not least <= value <= (LARGEST if most is None else most):
        wanted = f"of at least {least}" if most is None else f"in {least}..{most}"
        raise ArgumentError(f"{name} is {value!r}{where}; expected a whole number {wanted}")


def check_number(name: str, value: Any, least: float = 0, most: float = math.inf, where: str = "") -> None:
    """Refuse what is not a finite number in least..most."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not numeric or not least <= value <= most:
        wanted = f"of at least {least:g}" if most == math.inf else f"in {least:g}..{most:g}"
        raise ArgumentError(f"{name} is {value!r}{where}; expected a number {wanted}")


def check_numbers(name: str, values: Any) -> list[float]:
    """A list (or vector) of finite numbers as floats."""
    listed = values.tolist() if isinstance(values, (torch.Tensor, np.ndarray)) else values
    if not isinstance(listed, (list, tuple)) or not listed:
        raise ArgumentError(f"{name} is {values!r}; expected a list of numbers")
    for i, value in enumerate(listed):
        check_number(f"{name}[{i}]", value, least=-math.inf)
    return [float(value) for value in listed]
