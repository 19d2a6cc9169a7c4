"""Write an executable as an artifact."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from stepgraph.adapters import tuners_of
from stepgraph.errors import CompileError
from stepgraph.files.container import write_container
from stepgraph.files.whole_file import save_tensors
from stepgraph.fingerprint import config_of, dtype_name, fingerprint, model_dtype
from stepgraph.plan.refuse_other import refuse_other_schedule
from stepgraph.runtime.artifact.artifact import (
    FACTORS,
    FORMAT,
    MANIFEST,
    PLAN,
    VERSION,
    WEIGHTS,
    current_versions,
    manifest_bytes,
)
from stepgraph.runtime.program.program import describes_tensor, describes_tensors
from stepgraph.runtime.program.stated_facts import stated_facts
from stepgraph.runtime.session.begin_run import begin_run
from stepgraph.runtime.session.compiled import Compiled
from stepgraph.runtime.session.follow_weights import follow_weights
from stepgraph.scheduler import prepare_scheduler
from stepgraph.weight_kinds import kind_of, own_kinds


def write_artifact(executable: Compiled, path: str | Path, with_weights: bool = False, scheduler: Any = None) -> None:
    """Write an executable (`Executable.save`)."""
    if executable.example is None:
        raise CompileError("this executable does not know the inputs that it was compiled with; compile it anew to save it")
    # What runs would refuse is not saved, and what is, is the model as it is now.
    executable, _, _ = begin_run(executable)
    follow_weights(executable, everything=True)
    if scheduler is not None:
        header = executable.plan.header
        refuse_other_schedule(
            header, prepare_scheduler(scheduler, header.steps, schedule=header.schedule), "the scheduler to save"
        )
    with TemporaryDirectory(prefix="stepgraph-artifact-") as place:
        work = Path(place)
        files = _write_parts(executable, work, with_weights)
        described = _described(executable, with_weights, scheduler)
        described["files"] = {name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for name, file in files.items()}
        (work / MANIFEST).write_bytes(manifest_bytes(described))
        write_container(path, {MANIFEST: work / MANIFEST, **files})


def _write_parts(executable: Compiled, work: Path, with_weights: bool) -> dict[str, Path]:
    executable.plan.save(work / PLAN)
    files = {PLAN: work / PLAN}
    if executable.factors is not None:
        executable.factors.save(work / FACTORS)
        files[FACTORS] = work / FACTORS
    if with_weights:
        _refuse_adapters(executable.model)
        save_tensors(work / WEIGHTS, weights_of(executable.model))
        files[WEIGHTS] = work / WEIGHTS
    for variant in range(len(executable.default.variants)):
        step = executable.default.rows.index(variant)
        name = f"graph-{variant:03d}-step-{step:03d}.txt"
        (work / name).write_text(executable.print_readable(step), encoding="utf-8")
        files[name] = work / name
    return files


def _refuse_adapters(model: nn.Module) -> None:
    """A model that is built of its configuration has no adapters."""
    path = next((path for path, _ in tuners_of(model)), None)
    if path is not None:
        raise CompileError(
            f"{path} has adapters, which an artifact with weights cannot hold; fuse and unload them (fuse_lora, unload_lora), "
            f"or save with with_weights=False, and pass the model to stepgraph.load"
        )


def _described(executable: Compiled, with_weights: bool, scheduler: Any) -> dict[str, Any]:
    model, header = executable.model, executable.plan.header
    about: dict[str, Any] = {
        "class": type(model).__name__,
        "fingerprint": fingerprint(model),
        "dtype": dtype_name(model_dtype(model)),
    }
    if with_weights:
        about |= {
            "config": _plain(config_of(model), f"the configuration of {type(model).__name__}"),
            "tied": tied_weights(model),
            "facts": stated_facts(executable.default.facts),
        }
    sampler = {"class": header.scheduler, "hash": header.scheduler_hash}
    if scheduler is not None:
        sampler["config"] = _plain(config_of(scheduler), f"the configuration of {type(scheduler).__name__}")
    return {
        "format": FORMAT, "version": VERSION, "versions": current_versions(), "model": about, "scheduler": sampler,
        "inputs": {name: _describe_input(name, value) for name, value in (executable.example or {}).items()},
        "guidance": header.guidance, "branches": list(header.branches), "options": asdict(executable.config),
    }  # fmt: skip


def _plain(value: Any, what: str) -> Any:
    """A value as JSON keeps it; tuples become lists.

    Raises:
        CompileError: JSON has no such value.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CompileError(f"{what} cannot be saved as JSON ({error})") from error


def _describe_input(name: str, value: Any) -> dict[str, Any]:
    if describes_tensor(value):
        return {"shape": list(value[0]), "dtype": dtype_name(value[1])}
    if not describes_tensors(value):
        return {"value": _plain(value, f"the input {name}")}
    if isinstance(value, dict):
        return {"entries": {key: _describe_input(f"{name}[{key!r}]", entry) for key, entry in value.items()}}
    return {type(value).__name__: [_describe_input(f"{name}[{i}]", entry) for i, entry in enumerate(value)]}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers of a model, the temporary ones too, each once, in plain memory of its own."""
    weights = {}
    kinds = own_kinds(model)
    if kinds:
        name, tensor = next(iter(kinds.items()))
        raise CompileError(
            f"{name} is a {kind_of(tensor)}, which a file of plain tensors does not hold; save with with_weights=False, and "
            f"pass the quantised model to stepgraph.load"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        plain = tensor.detach().cpu().contiguous()
        weights[name] = plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()
    return weights


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Further names of weights that have several -> the name that `weights_of` gives them."""
    first: dict[int, str] = {}
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first[id(tensor)] for name, tensor in every if first.setdefault(id(tensor), name) != name}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
