"""Checks of single values, with one wording for all of them.

A message names the value, where it was given, what was expected, and (in `tail`) why or what to do:
`rank is 0 of ff; expected a whole number of at least 1, because ...`. True and false are no numbers here.
"""

import math
import reprlib
import sys
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from stepgraph.errors import ArgumentError

# Counts above this are not real, and would not survive as floating-point numbers.
LARGEST = 2**63 - 1
# More rows of a model's input, or samples, than any memory holds.
MOST_ROWS = 2**20
# Longer numbers say nothing to a reader, and Python refuses to write the longest.
LONGEST = 10**60


def shown(value: Any) -> str:
    """A value in an error: short, whatever it is."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array {list(value.shape)}"
    if isinstance(value, int) and abs(value) > LONGEST:
        return f"a number of about {int(value.bit_length() * 0.30103)} digits"
    if isinstance(value, (type(None), bool, int, float, np.generic, str, bytes, PurePath)):
        text = repr(value)
        return text if len(text) <= 120 else text[:117] + "..."
    if type(value) in (list, tuple, dict, set, frozenset):
        return _SHORT.repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


class _Short(reprlib.Repr):
    """Lists and mappings with their first entries, each as `shown` has it."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 4

    def repr1(self, x: Any, level: int) -> str:
        """One entry; `level` is how deep it may go."""
        return super().repr1(x, level) if type(x) in (list, tuple, dict, set, frozenset) else shown(x)


_SHORT = _Short()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in memory as usual, and holds finite values."""
    return tensor.layout == torch.strided and tensor.device.type != "meta" and bool(tensor.isfinite().all())


def is_whole(value: Any, least: int = -LARGEST, most: int = LARGEST) -> bool:
    """Whether a value is a whole number in least..most."""
    return type(value) is int and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether a value is a finite number. The comparison takes whole numbers of any length, and no NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_flag(name: str, value: Any, *, tail: str = "", error: type[Exception] = ArgumentError) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise error(f"{name} is {shown(value)}; expected True or False{tail}")


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
        raise error(f"{name} is {shown(value)}{where}; expected a whole number {wanted}{tail}")


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
        raise error(f"{name} is {shown(value)}{where}; expected {what}{_bounds(least, most, above, below)}{tail}")


def _bounds(least: float, most: float, above: float, below: float) -> str:
    """In words, with a blank before them; nothing where there are none."""
    if above == -math.inf < least and most < math.inf:
        return f" in {least:g}..{most:g}"
    lower = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
    upper = f" below {below:g}" if below < math.inf else f" at most {most:g}" if most < math.inf else ""
    return f"{lower} and{upper}" if lower and upper else lower + upper


def check_device(name: str, value: Any) -> torch.device:
    """A device that values can lie on here."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"{name} is {shown(value)}, an unknown device; expected cpu, cuda or cuda:N") from error
    if device.type == "meta" or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ArgumentError(
            f"{name} is {shown(value)}, and no such device holds values here; expected cpu, or see `stepgraph doctor`"
        )
    return device


def check_numbers(name: str, values: Any) -> list[float]:
    """A list (or vector) of finite numbers as floats."""
    if isinstance(values, torch.Tensor) and (values.layout != torch.strided or values.device.type == "meta"):
        raise ArgumentError(f"{name} is {shown(values)} that holds no numbers; expected a list of numbers")
    listed = values.tolist() if isinstance(values, (torch.Tensor, np.ndarray)) else values
    if not isinstance(listed, (list, tuple)) or not listed:
        raise ArgumentError(f"{name} is {shown(values)}; expected a list of numbers")
    for i, value in enumerate(listed):
        check_number(f"{name}[{i}]", value, least=-math.inf, what="a number that is finite")
    return [float(value) for value in listed]
