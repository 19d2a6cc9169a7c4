"""Artifacts on the command line, and `stepgraph cache`: compiled regions that are kept on disk."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stepgraph.cli.options import Json, parse_dtype, reports_errors, show
from stepgraph.compiler.entry.load_artifact import build_scheduler, compile_artifact
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.errors import CompileError, PlanError
from stepgraph.files.store import Store
from stepgraph.plan.refuse_other import refuse_other_schedule
from stepgraph.runtime.artifact.read_artifact import read_artifact
from stepgraph.runtime.executable import Executable
from stepgraph.scheduler import prepare_scheduler

cache_app = typer.Typer(no_args_is_help=True, help="Compiled regions that are kept on disk.")


def load_saved(path: Path, model: str | None, device: str, scheduler: str | None) -> tuple[Executable, Any]:
    """An artifact's executable, and the scheduler to sample it with.

    Raises:
        PlanError: It brings no scheduler and the model that would have one is not named.
    """
    artifact = read_artifact(path)
    chosen = build_scheduler(artifact) if scheduler is None else None
    if chosen is None and model is None:
        raise PlanError(f"{path} brings no scheduler; name the model that it lies beside, or save it with one")
    chosen = chosen or load_scheduler(str(model), scheduler)
    dtype = parse_dtype(artifact.plan.header.dtype)
    return compile_artifact(artifact, None if model is None else load_model(model, device, dtype), device=device), chosen


def scheduler_for(executable: Executable, model: str) -> Any:
    """The scheduler beside a model where it is the plan's, or None."""
    header, scheduler = executable.plan.header, load_scheduler(model)
    try:
        refuse_other_schedule(header, prepare_scheduler(scheduler, header.steps, schedule=header.schedule), "the model")
    except PlanError:
        return None
    return scheduler


def _store() -> Store:
    from stepgraph.compiler.lowering.region_cache import region_store

    store = region_store()
    if store is None:
        raise CompileError("STEPGRAPH_REGIONS is 0, so that no regions are kept; unset it")
    return store


@cache_app.command(name="ls")
@reports_errors
def cache_ls(as_json: Json = False) -> None:
    """List what is kept, last used first."""
    store = _store()
    entries = [{"key": entry.key, "bytes": entry.bytes, "used": entry.used} for entry in store.entries()]
    if as_json:
        print(json.dumps({"folder": str(store.folder), "limit": store.limit, "entries": entries}))
        return
    for entry in entries:
        print(f"{entry['key']}  {entry['bytes']:>10}")
    print(f"{store.folder}: {len(entries)} regions, {sum(entry.bytes for entry in store.entries()) / 1e6:.1f} MB")


@cache_app.command(name="prune")
@reports_errors
def cache_prune(
    max_mb: Annotated[float | None, typer.Option(min=0, help="keep at most this much; by default the usual limit")] = None,
    as_json: Json = False,
) -> None:
    """Remove what is damaged, and what was not used for longest until the rest is within the limit."""
    show({"removed": _store().prune(None if max_mb is None else int(max_mb * 1e6), verify=True)}, as_json)


@cache_app.command(name="clear")
@reports_errors
def cache_clear(as_json: Json = False) -> None:
    """Remove everything."""
    show({"removed": _store().prune(0)}, as_json)
