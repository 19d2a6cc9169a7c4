"""Malformed arguments: values that nobody should pass, and valid ones with something wrong in them."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

# Files that the calls write: they are other ones from call to call.
WRITTEN = ("written", "picture", "graph")


class Junk:
    """A value by the name under which a failure shows it."""

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value

    def __repr__(self) -> str:
        return self.name


def nothing(*_: object, **__: object) -> None:
    """A function that takes anything."""


def junk_values(folder: Path, others: Mapping[str, object]) -> list[Junk]:
    """Values of every kind; `others` are whole objects that belong to something else."""
    (folder / "damaged.json").write_text('{"format": "stepgraph-plan", "ver')
    (folder / "damaged.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (folder / "damaged.pt").write_bytes(b"PK\x03\x04nothing")
    (folder / "list.json").write_text("[1, 2]")
    (folder / "empty").mkdir()
    plain = [
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2**40,
        2**70,
        10**5000,
        0.5,
        -0.5,
        math.nan,
        math.inf,
        -math.inf,
        1e300,
        "",
        "nose",
        "1",
        "a\0b",
        "x" * 300,
        b"bytes",
        [],
        [None],
        ["nose"],
        [math.nan],
        [-1],
        (),
        {},
        {"nose": 1},
        {1: 2},
        {"nose": None},
        {"sigmas": ["a"]},
        {"begin": 99},
        {"strength": 2},
        {"timesteps": [1]},
        {"mu": 1.0},
        {"every": 0},
        {"every": "x"},
        {"hidden_states": None},
        {"class_labels": None},
        {"class_labels": [1]},
        {"class_labels": "a"},
        {"added_cond_kwargs": {"resolution": None}},
        set(),
        object(),
        np.int64(3),
        np.float32(0.5),
        np.zeros(3),
        torch.device("meta"),
        torch.float32,
        int,
        nothing,
    ]
    tensors = {
        "a tensor": torch.zeros(2, 3),
        "a 0-dim tensor": torch.tensor(1.0),
        "an empty tensor": torch.zeros(0, 4, 8, 8),
        "a meta tensor": torch.zeros(1, 4, 8, 8, device="meta"),
        "a NaN tensor": torch.full((1, 4, 8, 8), math.nan),
        "a whole tensor": torch.zeros(1, 4, 8, 8, dtype=torch.int64),
        "a float64 tensor": torch.zeros(1, 4, 8, 8, dtype=torch.float64),
        "a dict of tensors": {"class_labels": torch.zeros(1)},
        "a complex tensor": torch.zeros(2, 2, dtype=torch.complex64),
        "labels out of range": {"class_labels": torch.tensor([99999])},
        "a sparse tensor": torch.eye(3).to_sparse(),
    }
    objects = {
        "a linear map": nn.Linear(2, 2), "a module without config": type("DiTTransformer2DModel", (nn.Module,), {})(),
        "no module": SimpleNamespace(config={}), "an empty pipeline": SimpleNamespace(transformer=None, scheduler=None),
    }  # fmt: skip
    paths = {f"the path {p}": folder / p for p in ("missing.json", "empty", "damaged.json", "damaged.safetensors",
             "damaged.pt", "list.json", "missing/plan.json", "damaged.json/below")}  # fmt: skip
    named = tensors | objects | paths | dict(others)
    return [Junk(_brief(value), value) for value in plain] + [Junk(name, value) for name, value in named.items()]


def _brief(value: object) -> str:
    return "10**5000" if isinstance(value, int) and value > 2**100 else repr(value)[:60]


def malformed(draw: random.Random, value: object, junk: list[Junk], depth: int = 3) -> Junk:
    """Something else in a value's place, or the value with something wrong in it."""
    ways = _ways(value) if depth else []
    way = draw.choice([None, *ways])
    if way is None:
        return draw.choice(junk)
    if way in ("entry", "added", "dropped", "renamed"):
        return _other_container(draw, value, junk, depth, way)
    if way == "field":
        name = draw.choice([field.name for field in fields(value)])
        return _wrong_field(value, name, malformed(draw, getattr(value, name), junk, depth - 1))
    if isinstance(value, Path):
        return _other_file(draw, value, junk)
    changed = way(value)
    return Junk(f"{_shown(value)} changed to {_shown(changed)}", changed)


def _ways(value: object) -> list[object]:
    if isinstance(value, torch.Tensor):
        cut = [lambda t: t[..., :-1], lambda t: t[:0]] if value.ndim and value.numel() > 1 else []
        numbers = [lambda t: t * math.nan if t.is_floating_point() else t - 5, lambda t: t + 10**6]
        shapes = [lambda t: t[None], lambda t: t.flatten()[:1].reshape(()) if t.numel() else t,
                  lambda t: t[..., :-1, :-1] if t.ndim > 1 else t[:1].repeat(3)]  # fmt: skip
        kinds = [torch.Tensor.double, torch.Tensor.bool, lambda t: t.to(torch.complex64), lambda t: t.to("meta"),
                 torch.Tensor.to_sparse, torch.Tensor.tolist]  # fmt: skip
        return [*cut, *shapes, *kinds, *numbers]
    if isinstance(value, Mapping) or (isinstance(value, (list, tuple)) and value):
        return ["entry", "added", "dropped", "renamed"]
    # An executable is made by compiling alone.
    if is_dataclass(value) and not isinstance(value, type) and type(value).__name__ != "Executable":
        return ["field"]
    if isinstance(value, Path):
        return ["file"] * 4
    if isinstance(value, str):
        return [str.upper, lambda t: t[:-1], lambda t: t + "x", lambda t: t * 40]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [lambda n: -n, lambda n: n + 1, float, bool, np.float64, lambda n: n * 10**30, str]
    return []


def _other_container(draw: random.Random, value, junk: list[Junk], depth: int, way: str) -> Junk:
    """A mapping or list with an entry more, less, under another name, or malformed."""
    if isinstance(value, Mapping):
        changed, keys = dict(value), list(value)
        key = draw.choice(keys) if keys else "nose"
        entry = malformed(draw, changed.get(key), junk, depth - 1)
        if way == "dropped":
            changed.pop(key, None)
            return Junk(f"without {key!r}", changed)
        if way == "renamed":
            changed = {("nose" if name == key else name): held for name, held in changed.items()}
            return Junk(f"{key!r} called 'nose'", changed)
        key = draw.choice(["nose", "", 1, None]) if way == "added" else key
        return Junk(f"with {key!r}: {entry}", changed | {key: entry.value})
    place = draw.randrange(len(value))
    entry = malformed(draw, value[place], junk, depth - 1)
    listed = list(value)
    listed[place : place + 1] = {"dropped": [], "added": [value[place], entry.value], "renamed": [entry.value] * 2}.get(
        way, [entry.value]
    )
    return Junk(f"{way} at {place}: {entry}", type(value)(listed) if type(value) in (list, tuple) else listed)


def _wrong_field(value, name: str, entry: Junk) -> Junk:
    """A record with another field, as it is where the record itself refuses it."""
    from stepgraph.errors import StepgraphError

    try:
        return Junk(f"{name}={entry}", replace(value, **{name: entry.value}))
    except (StepgraphError, TypeError):
        return entry


def _other_file(draw: random.Random, path: Path, junk: list[Junk]) -> Junk:
    """A file that is cut, that has other bytes, or (JSON) another leaf."""
    if not path.is_file() or path.stem in WRITTEN:
        return draw.choice([entry for entry in junk if isinstance(entry.value, (Path, str))])
    content = path.read_bytes()
    place = draw.randrange(len(content))
    how = draw.choice(["cut", "byte", "more", "leaf", "leaf", "leaf"])
    other = path.with_name("malformed" + path.suffix)
    if how == "leaf" and content[:1] in (b"{", b"["):
        note, text = _other_json(draw, content.decode(), junk)
        other.write_text(text)
        return Junk(f"{path.name} with {note}", other)
    if how == "leaf":
        how = "byte"
    changed = {"cut": content[:place], "byte": content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :],
               "more": content + b"more"}[how]  # fmt: skip
    other.write_bytes(changed)
    return Junk(f"{path.name} {how} at {place}", other)


def _other_json(draw: random.Random, text: str, junk: list[Junk]) -> tuple[str, str]:
    """JSON in which one leaf is another one, gone, or there twice, and what was changed."""
    plain = [entry for entry in junk if _is_json(entry.value)]
    document = json.loads(text)
    place, at = document, []
    while isinstance(place, (dict, list)) and place:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        at.append(key)
        if not isinstance(place[key], (dict, list)) or draw.randrange(5) == 0:
            break
        place = place[key]
    if not at or not isinstance(place, (dict, list)) or not place:
        return "nothing", text
    if draw.randrange(5) == 0:
        del place[at[-1]]
        return f"{at} gone", json.dumps(document)
    entry = malformed(draw, place[at[-1]], plain, 1)
    entry = entry if _is_json(entry.value) else Junk("None", None)
    place[at[-1]] = entry.value
    return f"{at} = {entry}", json.dumps(document)


def _is_json(value: object) -> bool:
    try:
        return len(json.dumps(value)) < 1000
    except (TypeError, ValueError):
        return False


def _shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        return f"{value.dtype} {list(value.shape)} on {value.device}{layout}"
    return _brief(value)
