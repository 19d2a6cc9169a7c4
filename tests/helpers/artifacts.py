"""Executables that are saved, and forged artifacts."""

import hashlib
import json
from pathlib import Path

import torch

import stepgraph as sg
from helpers.tiny import inputs, labels, noise, tiny_scheduler
from stepgraph.runtime.artifact.artifact import manifest_bytes


def rewrite(path: Path, **changes) -> None:
    """Forge a manifest: its digest is right again."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_bytes(manifest_bytes(manifest | changes))


def rehash(path: Path, name: str) -> None:
    """Forge a file: the manifest states its hash."""
    data = (path / name).read_bytes()
    files = json.loads((path / "manifest.json").read_text())["files"]
    rewrite(path, files=files | {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}})


def images(executable: sg.Executable) -> torch.Tensor:
    return sg.sample(executable, tiny_scheduler("ddim"), noise(2), **labels(1, 2))


def compiled_with_factors(dit) -> sg.Executable:
    """A plan with REUSE, FORECAST and LOWRANK rows, compiled with its factors."""
    ddim = tiny_scheduler("ddim")
    actions = {"ff": "CCRRCC", "attn": "CCRCRC", "hidden": "CCCCCR"}
    plan = sg.make_plan("manual", model=dit, scheduler=ddim, steps=6, actions=actions)
    factors = sg.factorize(dit, method="svd", rank=4)
    plan = sg.lowrank(sg.forecast(plan, "taylor", order=1, kinds=["attn"]), kinds=["ff"])
    return sg.compile(dit, plan, inputs(2), "eager", factors=factors)
