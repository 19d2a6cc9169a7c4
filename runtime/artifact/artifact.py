"""What an artifact is: an executable on disk, as data (docs/artifacts.md)."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepgraph.config import CompileConfig
from stepgraph.plan import CachePlan

FORMAT = "stepgraph-artifact"
VERSION = 1
MANIFEST, PLAN, FACTORS, WEIGHTS = "manifest.json", "plan.json", "factors.safetensors", "weights.safetensors"
KEYS = ("format", "version", "versions", "model", "scheduler", "inputs", "guidance", "branches", "options", "files", "digest")


@dataclass(frozen=True)
class Artifact:
    """What an artifact holds.

    Attributes:
        path: Where it lies.
        plan: Its plan.
        options: How it is compiled.
        inputs: The model's forward arguments that it was compiled for: a tensor as (shape, dtype), a container of tensors as
            one of these, anything else by its value.
        model: "class", "fingerprint" and "dtype" of the model, and with weights its "config", what is "tied", and
            the "facts" that its forward read (`stated_facts`).
        scheduler: "class", "hash" and, where it was given, "config".
        versions: "stepgraph", "torch", "diffusers", "python" that made it.
        factors: Contents of the file of low-rank factors, where the plan has some.
        weights: Contents of the file of weights, where it brings them.
    """

    path: Path
    plan: CachePlan
    options: CompileConfig
    inputs: Mapping[str, Any]
    model: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    versions: Mapping[str, str]
    factors: bytes | None
    weights: bytes | None


def current_versions() -> dict[str, str]:
    """The versions that a program depends on."""
    packages = {"stepgraph": "stepgraph", "torch": "torch", "diffusers": "diffusers"}
    versions = {name: importlib.metadata.version(package) for name, package in packages.items()}
    return {**versions, "torch": str(torch.__version__), "python": platform.python_version()}


def manifest_bytes(described: Mapping[str, Any]) -> bytes:
    """A manifest as it is written: one line per key, and the digest of all before it.

    There is one way to write a manifest, so that a reader notices every changed byte.
    """
    known = {key: described[key] for key in KEYS[:-1]}
    digest = hashlib.sha256(json.dumps(known, allow_nan=False).encode()).hexdigest()
    lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in {**known, "digest": digest}.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()
