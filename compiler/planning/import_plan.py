"""From a published plan file to a plan for a real model."""

import argparse
import inspect
import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepgraph.checked import checked
from stepgraph.compiler.importers import IMPORTERS
from stepgraph.compiler.marking.describe import make_header
from stepgraph.compiler.marking.traced_model import marked_graph
from stepgraph.errors import ArgumentError, FileFormatError, PlanError
from stepgraph.plan import FORMAT, CachePlan
from stepgraph.plan.header import NOTHING
from stepgraph.plan.json import without_duplicates
from stepgraph.schedule import Schedule, counted_steps
from stepgraph.scheduler import refuse_stochastic
from stepgraph.wrapped_models import unwrapped


@checked
def import_plan(
    path: str | Path,
    model: nn.Module,
    scheduler: Any,
    *,
    steps: int | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    allow_stochastic: bool = False,
    schedule: Schedule | Mapping[str, Any] | None = None,
    **options: Any,
) -> CachePlan:
    """Read a plan file of any known format, for a model and its schedule.

    Args:
        path: A JSON file, or a .pt / .pth checkpoint (only tensors, containers and argparse.Namespace are unpickled).
        model: The model it is for; shapes and sites are checked against it.
        scheduler: A diffusers scheduler.
        steps: Number of inference steps; may be left out where the schedule has sigmas or timesteps.
        example_inputs: The forward's arguments, where the model's usual shapes are not meant.
        allow_stochastic: Take the plan although the sampler adds noise.
        schedule: As for `stepgraph.sample`.
        **options: The format's own, such as `theta` of an L2C router.

    Raises:
        PlanError: The file is not of a known format or does not fit the model; the message names the file and the key.
    """
    model = unwrapped(model)
    path = Path(path)
    data = _read(path)
    if isinstance(data, dict) and data.get("format") == FORMAT:
        raise ArgumentError(f"{path} is stepgraph's own format; read it with CachePlan.load")
    name = next((name for name, importer in IMPORTERS.items() if importer.recognizes(data)), None)
    if name is None:
        known = "; ".join(importer.source for importer in IMPORTERS.values())
        keys = f" with the keys {', '.join(map(str, list(data)[:4]))}" if isinstance(data, dict) else ""
        raise FileFormatError(f"{path}: {type(data).__name__}{keys} is no known plan format; known: {known}")
    takes = [p.name for p in inspect.signature(IMPORTERS[name].actions).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(takes))
    if unknown:
        raise ArgumentError(f"{path}: the format {name!r} has no option {unknown[0]!r}; it takes {', '.join(takes) or 'none'}")
    chosen, count = counted_steps(schedule, steps, scheduler)
    marked = marked_graph(model, example_inputs)
    header = make_header(model, scheduler, count, marked, schedule=chosen)
    if not allow_stochastic:
        refuse_stochastic(scheduler, count, header.schedule)
    try:
        actions = IMPORTERS[name].actions(data, marked.sites, len(header.timesteps), **options)
        arguments = {"file": path.name, **options}
        return CachePlan.build(
            replace(header, policy=f"import:{name}", arguments=arguments, measured=NOTHING), marked.sites, actions
        )
    except PlanError as error:
        raise type(error)(f"{path}: {error}") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise PlanError(f"no plan file at {path}")
    if path.suffix in (".pt", ".pth"):
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileFormatError(f"{path}: not a checkpoint that can be read safely ({first})") from error
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except PlanError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not a complete JSON document ({error})") from error
