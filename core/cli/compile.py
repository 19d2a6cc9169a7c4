"""`stepgraph compile`: a plan compiled for a model, its first steps run once."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stepgraph.cli.artifact import scheduler_for
from stepgraph.cli.options import (
    Backend,
    Batch,
    Device,
    Dtype,
    FactorsFile,
    Json,
    Model,
    load_factors,
    parse_device,
    parse_dtype,
    progress_bar,
    reports_errors,
    show,
)
from stepgraph.compiler.entry.load_model import load_model
from stepgraph.compiler.marking.describe import planned_inputs
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import SLOT_DTYPES, CompileConfig
from stepgraph.errors import ArgumentError
from stepgraph.files.whole_file import whole_file, writable_folder
from stepgraph.plan import CachePlan
from stepgraph.runtime.executable import Executable


@reports_errors
def compile_command(
    model: Model,
    plan: Annotated[Path, typer.Option(help="the plan file")],
    batch: Batch = 2,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backend: Backend = "inductor",
    factors: FactorsFile = None,
    exact: Annotated[bool, typer.Option(help="bit-equal to the eager model; needs --backend eager")] = False,
    hoist_limit_mb: Annotated[float | None, typer.Option(help="most megabytes of what is computed before the loop")] = None,
    prepack: Annotated[bool, typer.Option(help="with inductor on a CPU: a copy of linear weights in oneDNN's layout")] = True,
    merge: Annotated[
        bool, typer.Option(help="with packed weights: run linear maps of one input, as q, k and v, as one")
    ] = True,
    slot_dtype: Annotated[str | None, typer.Option(help=f"keep stored values as {', '.join(SLOT_DTYPES)}")] = None,
    offload: Annotated[bool, typer.Option(help="keep stored values in host memory between uses that are far apart")] = False,
    respecialize: Annotated[
        bool, typer.Option(help="where other adapters are on at a run, compile for them; else such runs are refused")
    ] = True,
    dump: Annotated[Path | None, typer.Option(help="write the readable graph of every variant into this folder")] = None,
    save: Annotated[Path | None, typer.Option(help="write an artifact: a folder, or a file that ends in .zip")] = None,
    with_weights: Annotated[bool, typer.Option("--with-weights", help="put the weights into the artifact")] = False,
    as_json: Json = False,
) -> None:
    """Compile a plan for a model, run its first steps once, and report stages, variants, MACs and memory."""
    if with_weights and save is None:
        raise ArgumentError("--with-weights goes with --save, which says where the artifact is written")
    with progress_bar("compiling", as_json) as report:
        report("loading", 0, 3)
        loaded = load_model(model, parse_device(device), parse_dtype(dtype))
        report("compiling", 1, 3)
        cache_plan = CachePlan.load(plan)
        traced = TracedModel(loaded)
        inputs = planned_inputs(loaded, traced.family, cache_plan.header, batch)
        config = CompileConfig(
            backend, exact, hoist_limit_mb=hoist_limit_mb, prepack=prepack, merge=merge, slot_dtype=slot_dtype,
            offload=offload, respecialize=respecialize,
        )  # fmt: skip
        executable = compile_plan(loaded, cache_plan, inputs, config, load_factors(plan, factors), traced)
        report("first step", 2, 3)
        started = time.perf_counter()
        executable.session()(**inputs)
        first = time.perf_counter() - started
    program, macs = executable.default, executable.macs()
    facts = {
        "model": model,
        "backend": backend,
        "batch": batch,
        "steps": executable.plan.steps,
        "variants": len(program.variants),
        "nodes_per_variant": [len(variant.graph.graph.nodes) for variant in program.variants],
        "regions": program.regions,
        "tables": len(program.hoisted.tables) if program.hoisted is not None else 0,
        "seconds": {**program.seconds, "first_step": first},
        "macs": macs.computed,
        "macs_total": macs.total,
        "ideal_speedup": macs.ideal_speedup,
        "memory": asdict(executable.memory()),
        "fused_operations": executable.providers(),
    }
    if dump is not None:
        facts["dumped"] = dump_variants(executable, writable_folder(dump))
    if save is not None:
        executable.save(save, with_weights, scheduler_for(executable, model))
        facts["saved"] = str(save)
    show(facts, as_json)


def dump_variants(executable: Executable, out: Path) -> list[str]:
    """Write the source of every variant; returns the paths."""
    paths = []
    for variant in range(len(executable.default.variants)):
        step = executable.default.rows.index(variant)
        path = out / f"variant{variant:03d}-step{step:03d}.py"
        with whole_file(path) as partial:
            partial.write_text(executable.print_readable(step), encoding="utf-8")
        paths.append(str(path))
    return paths
