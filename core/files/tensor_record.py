"""Tensors with what they belong to: safetensors files whose metadata is JSON under the key "stepgraph"."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from stepgraph.checks import is_whole
from stepgraph.errors import FileFormatError, PlanError
from stepgraph.files.whole_file import save_tensors


def write_tensor_record(
    path: str | Path, form: str, version: int, described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a record of a format and version; the file appears whole or not at all."""
    whole = {"format": form, "version": version, **described}
    save_tensors(path, {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"stepgraph": json.dumps(whole)})


def read_tensor_record(
    path: str | Path, form: str, version: int, remedy: str = ""
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata and the tensors of a record; `remedy` says what to do where there is no file.

    Raises:
        PlanError: The file is missing, cut short, or not of this format and version.
    """
    if not Path(path).is_file():
        raise PlanError(f"no file at {path}" + (f"; {remedy}" if remedy else ""))
    try:
        with safe_open(str(path), framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("stepgraph", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not a complete {form} file ({error})") from error
    _refuse_other_form(described, path, form, version)
    return described, tensors


def parse_tensor_record(data: bytes, where: str, form: str, version: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """As `read_tensor_record`, of a file's contents; `where` is what errors call it.

    Raises:
        PlanError: It is cut short, or not of this format and version.
    """
    tensors = parse_tensors(data, where)
    try:
        # What safetensors has taken begins with the size of its header, which is JSON.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        described = json.loads(header.get("__metadata__", {}).get("stepgraph", "{}"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where}: not a complete {form} file ({error})") from error
    _refuse_other_form(described, where, form, version)
    return described, tensors


def parse_tensors(data: bytes, where: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file's contents.

    Raises:
        PlanError: It is cut short, or holds a dtype that torch does not have.
    """
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FileFormatError(f"{where}: not a complete safetensors file ({error})") from error


def _refuse_other_form(described: Any, path: str | Path, form: str, version: int) -> None:
    if not isinstance(described, dict):
        raise FileFormatError(f"{path}: its metadata is not an object")
    if described.get("format") != form or not is_whole(described.get("version"), version, version):
        other = f"{described.get('format')} {described.get('version')!r}"
        raise FileFormatError(f"{path}: expected {form} version {version}; got {other}")
