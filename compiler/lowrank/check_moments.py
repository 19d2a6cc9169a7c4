"""What a file of covariances must hold before it is used."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepgraph.checks import is_number
from stepgraph.errors import FileFormatError
from stepgraph.fingerprint import dtype_name


def check_moments(inputs: Mapping[str, Any], tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Compare the tensors and numbers of covariances with what their inputs say.

    Args:
        inputs: Module path -> name of what it reads.
        tensors: By "xx/<name>", "sketch/<name>" and "yx/<site>".
        numbers: By name, and by site in whole mode.

    Raises:
        PlanError: Something is missing, or of another shape, dtype or type; the message says what was found and expected.
    """
    for path, name in inputs.items():
        if not isinstance(name, str):
            raise FileFormatError(f"the input of {path!r} is {name!r}; expected the name of what it reads")
    for name in dict.fromkeys(inputs.values()):
        sketched = f"sketch/{name}" in tensors
        key = f"sketch/{name}" if sketched else f"xx/{name}"
        if key not in tensors:
            raise FileFormatError(f"the covariance of {name!r} is missing; expected a tensor xx/{name} or sketch/{name}")
        _check_table(key, tensors[key], None)
        if not sketched and tensors[key].shape[0] != tensors[key].shape[1]:
            raise FileFormatError(f"{key} is {_shown(tensors[key])}; expected float32 [C, C]")
        _check_numbers(name, numbers, ("rows", "trace", "fourth", *(("removed",) if sketched else ())))
    for key in (key for key in tensors if key.startswith("yx/")):
        site = key.removeprefix("yx/")
        if site not in inputs:
            raise FileFormatError(f"{key} is given, but no input of {site!r}; expected one among inputs")
        _check_table(key, tensors[key], tensors[f"xx/{inputs[site]}"].shape[1] if f"xx/{inputs[site]}" in tensors else None)
        _check_numbers(site, numbers, ("yy",))


def _check_table(key: str, table: Tensor, channels: int | None) -> None:
    if table.ndim != 2 or table.dtype != torch.float32 or (channels is not None and table.shape[1] != channels):
        raise FileFormatError(f"{key} is {_shown(table)}; expected float32 [rows, {channels if channels is not None else 'C'}]")


def _check_numbers(name: str, numbers: Mapping[str, Any], wanted: tuple[str, ...]) -> None:
    moments = numbers.get(name)
    for key in wanted:
        if not isinstance(moments, dict) or not is_number(moments.get(key)):
            raise FileFormatError(f"the numbers of {name!r} are {moments!r}; expected a finite number {key!r} among them")


def _shown(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
