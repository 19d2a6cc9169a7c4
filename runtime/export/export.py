"""Exports: an executable as files that need no stepgraph to run, or to be read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepgraph.checked import checked
from stepgraph.errors import CompileError
from stepgraph.files.whole_file import whole_folder
from stepgraph.runtime.export.aoti import write_aoti
from stepgraph.runtime.export.graphs import write_graphs
from stepgraph.runtime.export.onnx import write_onnx
from stepgraph.runtime.export.pt2 import write_programs
from stepgraph.runtime.session.begin_run import begin_run
from stepgraph.runtime.session.compiled import Compiled
from stepgraph.runtime.session.follow_weights import follow_weights
from stepgraph.weight_kinds import kind_of, own_kinds

# Writes into an empty folder what its manifest then describes; returns that.
Writer = Callable[..., dict[str, Any]]
FORMATS: Mapping[str, Writer] = {"pt2": write_programs, "aoti": write_aoti, "onnx": write_onnx, "graph": write_graphs}
# The file that says what an export is, by which one knows one's own.
MANIFEST = "schedule.json"


@checked
def export(
    executable: Compiled,
    path: str | Path,
    format: str = "pt2",
    *,
    inputs: Mapping[str, Any] | None = None,
    scheduler: Any = None,
    portable: bool = True,
    force: bool = False,
) -> Path:
    """Write an executable into a folder (`Executable.export`); it appears whole or not at all.

    Args:
        executable: What to export; its own sessions may go on meanwhile.
        path: The folder; made if it does not exist.
        format: "pt2": torch.export programs of the variants, weights, the schedule and a runner. "aoti": the same with programs
            that AOTInductor compiled, which C++ runs too. "onnx": the same with ONNX programs, in float32 on the CPU. "graph":
            what every variant does, as readable source, as SVG and as DOT.
        inputs: The model's forward arguments whose shapes and dtypes the programs take; by default those that the executable
            was compiled with.
        scheduler: With "pt2", "aoti" and "onnx": the sampler, whose steps go into the schedule where they are fixed linear
            combinations. It is not changed.
        portable: Fused operations in plain torch operations; False keeps stepgraph's own, which whoever loads the programs
            must have registered.
        force: Replace an export that is there already.

    Raises:
        CompileError: The format is unknown, the folder holds something else, or the executable cannot be exported; the message
            says why.
        PlanError: The scheduler is not the one that the plan was made for.
        OSError: The folder cannot be written.
    """
    refuse_target(path, format, force)
    kinds = own_kinds(executable.model) if format != "graph" else {}
    if kinds:
        name, tensor = next(iter(kinds.items()))
        raise CompileError(
            f"{name} is a {kind_of(tensor)}, which the format {format!r} cannot hold; export the model before it is quantised, "
            f"or save an artifact (Executable.save), which is loaded with the quantised model"
        )
    # What is written are the weights, the adapters and their strengths as they are now.
    executable, program, _ = begin_run(executable, inputs)
    follow_weights(executable, everything=True)
    with whole_folder(path) as folder:
        manifest = FORMATS[format](folder, executable, program, scheduler=scheduler, portable=portable)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Path(path)


def refuse_target(path: str | Path, format: str, force: bool) -> None:
    """See that an export can be written, before anything is compiled for it.

    Raises:
        CompileError: The format is unknown, or there is something at `path` that is no export or is not to be replaced.
    """
    if format not in FORMATS:
        raise CompileError(f"unknown format {format!r} of exports; expected {', '.join(FORMATS)}")
    target = Path(path).resolve()
    if not target.exists():
        return
    if not target.is_dir():
        raise CompileError(f"{target} is a file; an export is a folder, so name another")
    if Path.cwd().is_relative_to(target):
        raise CompileError(
            f"the current folder lies at or below {target}, which an export would replace and so remove; name a folder in it"
        )
    if not any(target.iterdir()):
        return
    if not _is_export(target):
        raise CompileError(f"{target} holds something that is no export of stepgraph's; name an empty or a new folder")
    if not force:
        raise CompileError(f"{target} holds an export already; pass force=True (--force) to replace it, or name another folder")


def _is_export(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and str(manifest.get("format")).startswith("stepgraph-")
