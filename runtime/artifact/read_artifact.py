"""Read an artifact: what comes back has been checked, and is not yet compiled."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from stepgraph.checks import is_whole
from stepgraph.config import CompileConfig
from stepgraph.errors import FileFormatError, PlanError
from stepgraph.files.container import Container, plain_name
from stepgraph.fingerprint import dtype_name
from stepgraph.plan import CachePlan
from stepgraph.plan.json import without_duplicates
from stepgraph.runtime.artifact.artifact import (
    FACTORS,
    FORMAT,
    KEYS,
    MANIFEST,
    PLAN,
    VERSION,
    WEIGHTS,
    Artifact,
    manifest_bytes,
)

GRAPH = re.compile(r"graph-\d{3,6}-step-\d{3,6}\.txt")
# What a manifest, a plan of a thousand steps and sites, or a graph stay far below, and all graphs together.
LARGEST_JSON, LARGEST_TEXTS = 2**26, 2**30
DTYPES = {dtype_name(dtype): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool,
)}  # fmt: skip
MOST_SAMPLES = 2**16
# Containers of tensors within each other.
DEEPEST = 8


def read_artifact(path: str | Path) -> Artifact:
    """Read and check an artifact.

    Raises:
        PlanError: It is missing, damaged, of another format version, or not consistent; the message names the file.
    """
    with Container(path) as container:
        manifest = _parse_manifest(container.read(MANIFEST, LARGEST_JSON), f"{path}: {MANIFEST}")
        _refuse_other_files(manifest["files"], f"{path}: {MANIFEST}")
        listed = {name: _checked(container, name, stated) for name, stated in manifest["files"].items()}
        contents = {name: data for name, data in listed.items() if data is not None}
    if PLAN not in contents:
        raise FileFormatError(f"{path}: {MANIFEST} lists no {PLAN}; save the artifact again")
    try:
        plan = CachePlan.from_json(contents[PLAN].decode("utf-8"))
        _refuse_other_calls(manifest, plan)
        return Artifact(
            Path(path), plan, _options(manifest["options"]), _inputs(manifest["inputs"], plan),
            _model(manifest["model"], plan, WEIGHTS in contents), _scheduler(manifest["scheduler"], plan),
            _texts(manifest["versions"], "versions", ("stepgraph", "torch", "diffusers", "python")),
            contents.get(FACTORS), contents.get(WEIGHTS),
        )  # fmt: skip
    except (PlanError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: {error}") from error


def _parse_manifest(data: bytes, where: str) -> dict[str, Any]:
    """The manifest, if it is exactly as it was written."""
    try:
        manifest = json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where}: not a complete JSON document ({error}); save the artifact again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FileFormatError(f'{where}: not an artifact: expected an object with "format": "{FORMAT}"')
    if not is_whole(manifest.get("version"), VERSION, VERSION):
        raise FileFormatError(f"{where}: format version {manifest.get('version')!r}; this release reads version {VERSION}")
    if set(manifest) != set(KEYS):
        raise FileFormatError(f"{where}: the keys are {', '.join(manifest)}; expected {', '.join(KEYS)}")
    try:
        same = manifest_bytes(manifest) == data
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where}: no manifest has such values ({error}); save the artifact again") from error
    if not same:
        raise FileFormatError(f"{where}: its contents do not have the digest that it states; it is damaged or was changed")
    files = manifest["files"]
    if not isinstance(files, dict) or not all(plain_name(name) and name != MANIFEST for name in files):
        raise FileFormatError(f"{where}: files is not an object of plain file names")
    return manifest


def _refuse_other_files(files: Mapping[str, Any], where: str) -> None:
    """Files that no artifact has, or that are larger than any artifact's."""
    for name, stated in files.items():
        if not isinstance(stated, dict) or set(stated) != {"bytes", "sha256"} or not is_whole(stated["bytes"]):
            raise FileFormatError(f"{where} says {stated!r} of {name}; expected its bytes and its sha256")
        tensors = name in (FACTORS, WEIGHTS)
        if not tensors and name != PLAN and not GRAPH.fullmatch(name):
            raise FileFormatError(f"{where} lists {name}, which is no part of an artifact; save the artifact again")
        if stated["bytes"] > LARGEST_JSON and not tensors:
            raise FileFormatError(f"{where}: {name} has {stated['bytes']} bytes; a plan or graph has at most {LARGEST_JSON}")
    texts = sum(stated["bytes"] for name, stated in files.items() if GRAPH.fullmatch(name))
    if texts > LARGEST_TEXTS:
        raise FileFormatError(f"{where}: graphs of {texts} bytes together; an artifact has at most {LARGEST_TEXTS}")


def _checked(container: Container, name: str, stated: Mapping[str, Any]) -> bytes | None:
    """A file's contents, if they are those that the manifest states; of a graph's text none, for nothing reads it."""
    data = container.read(name, stated["bytes"])
    if len(data) != stated["bytes"] or hashlib.sha256(data).hexdigest() != stated["sha256"]:
        raise FileFormatError(
            f"{container.path}: {name} is not the file that was saved (it has {len(data)} of {stated['bytes']} bytes, or "
            f"its hash differs); save the artifact again"
        )
    return None if GRAPH.fullmatch(name) else data


def _refuse_other_calls(manifest: Mapping[str, Any], plan: CachePlan) -> None:
    header = plan.header
    stated, planned = (manifest["guidance"], manifest["branches"]), (header.guidance, list(header.branches))
    if stated != planned:
        raise FileFormatError(f"guidance and branches are {stated!r}; the plan's are {planned!r}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _texts(value: Any, what: str, keys: tuple[str, ...]) -> dict[str, str]:
    if not isinstance(value, dict) or set(value) != set(keys) or not all(isinstance(text, str) for text in value.values()):
        raise FileFormatError(f"{what} is {value!r}; expected texts for {', '.join(keys)}")
    return value


def _options(value: Any) -> CompileConfig:
    types = {field.name: field.type for field in fields(CompileConfig)}
    if not isinstance(value, dict):
        raise FileFormatError(f"options is {type(value).__name__}; expected an object")
    for name, option in value.items():
        if name not in types:
            raise FileFormatError(f"unknown option {name!r}; this release has {', '.join(types)}")
        if not isinstance(option, types[name]):  # type: ignore[arg-type]
            raise FileFormatError(f"the option {name} is {option!r}, which is not of the type it has")
    try:
        return CompileConfig(**value)
    except ValueError as error:
        raise FileFormatError(f"options: {error}") from error


def _inputs(value: Any, plan: CachePlan) -> dict[str, Any]:
    """Shapes and dtypes of the tensors, the plan's but for the batch, and the values of everything else."""
    if not isinstance(value, dict):
        raise FileFormatError(f"inputs is {value!r}; expected an object of objects")
    return {name: _input(name, entry, plan, DEEPEST) for name, entry in value.items()}


def _input(name: str, entry: Any, plan: CachePlan, deep: int) -> Any:
    """What is said of one input, or of an entry of one that is a container, with so many levels to go."""
    if not isinstance(entry, dict) or not deep:
        raise FileFormatError(f"inputs has {name}: {entry!r}; expected an object, at most {DEEPEST} containers deep")
    if set(entry) == {"value"}:
        return entry["value"]
    if set(entry) == {"entries"} and isinstance(entry["entries"], dict):
        return {key: _input(f"{name}__{key}", part, plan, deep - 1) for key, part in entry["entries"].items()}
    for kind in (list, tuple):
        parts = entry.get(kind.__name__)
        if len(entry) == 1 and isinstance(parts, list):
            return kind(_input(f"{name}__{i}", part, plan, deep - 1) for i, part in enumerate(parts))
    return _tensor(name, entry, plan)


def _tensor(name: str, entry: Mapping[str, Any], plan: CachePlan) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of an input that is a tensor."""
    shape, dtype = entry.get("shape"), DTYPES.get(str(entry.get("dtype")))
    planned = plan.header.shapes.get(name)
    sizes = tuple(shape) if isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape) else None
    fits = sizes is not None and planned is not None and (sizes == planned or sizes[1:] == planned)
    if set(entry) != {"shape", "dtype"} or dtype is None or sizes is None or not fits or sizes[:1] > (MOST_SAMPLES,):
        raise FileFormatError(
            f"the input {name} is {entry!r}; expected the plan's shape {planned} behind a batch of at most {MOST_SAMPLES}, "
            f"and one of the dtypes {', '.join(DTYPES)}"
        )
    return sizes, dtype


def _model(value: Any, plan: CachePlan, with_weights: bool) -> dict[str, Any]:
    """The model's description; the plan is for the same class and structure."""
    keys = ("class", "fingerprint", "dtype", *(("config", "tied") if with_weights else ()))
    if not isinstance(value, dict) or set(value) - ({"facts"} if with_weights else set()) != set(keys):
        raise FileFormatError(f"model is {value!r}; expected {', '.join(keys)}")
    about = _texts({key: value[key] for key in keys[:3]}, "model", keys[:3])
    header = plan.header
    if (about["class"], about["dtype"]) != (header.model, header.dtype):
        raise FileFormatError(
            f"the artifact is of a {about['dtype']} {about['class']}, its plan of a {header.dtype} {header.model}"
        )
    if with_weights and not isinstance(value["config"], dict):
        raise FileFormatError(f"the model's config is {type(value['config']).__name__}; expected an object")
    if with_weights:
        for name in ("tied", "facts"):
            texts = value.get(name, {})
            _texts(texts, f"the model's {name}", tuple(texts) if isinstance(texts, dict) else ())
    return value


def _scheduler(value: Any, plan: CachePlan) -> dict[str, Any]:
    stated = dict(value) if isinstance(value, dict) else {}
    config = stated.pop("config", {})
    facts = _texts(stated, "scheduler", ("class", "hash"))
    if not isinstance(config, dict) or (facts["class"], facts["hash"]) != (plan.header.scheduler, plan.header.scheduler_hash):
        raise FileFormatError(
            f"the scheduler is {facts}; expected the plan's {plan.header.scheduler} {plan.header.scheduler_hash}"
        )
    return {**facts, "config": config} if "config" in value else dict(facts)
