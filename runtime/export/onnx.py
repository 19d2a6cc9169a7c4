"""ONNX exports: the pt2 export with ONNX programs, for whatever runs those."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import fx

from stepgraph.errors import CompileError
from stepgraph.runtime.export.pt2 import Saver, write_programs
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.session.compiled import Compiled

NEEDED = ("onnx", "onnxscript")


def write_onnx(folder: Path, executable: Compiled, program: Program, *, scheduler: Any, portable: bool) -> dict[str, Any]:
    """Write ONNX programs, weights and the runner; returns the schedule (see `stepgraph.runtime.export.export.export`)."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CompileError(f"the format 'onnx' needs {missing[0]}, which is not installed; pip install 'stepgraph[onnx]'")
    if not portable:
        raise CompileError("portable=False keeps stepgraph's own operations, which ONNX does not have; leave it out")
    weight = next(executable.model.parameters())
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise CompileError(f"the format 'onnx' is for float32 on the CPU; the model is {weight.dtype} on {weight.device}")
    return write_programs(folder, executable, program, scheduler=scheduler, portable=True, saver=ONNX)


def save_onnx(exported: torch.export.ExportedProgram, path: Path) -> None:
    """Translate a program and write it; its inputs stay in their order."""
    erase_idle_squeezes(exported.graph)
    translated = torch.onnx.export(exported, dynamo=True, verbose=False)
    wanted = len(exported.graph.find_nodes(op="placeholder"))
    if translated is None or len(translated.model.graph.inputs) != wanted:
        raise CompileError(f"torch.onnx changed the {wanted} inputs of {path.stem}; export as pt2")
    translated.save(path)


def erase_idle_squeezes(graph: fx.Graph) -> None:
    """Take out squeezes of a dimension that is not 1: torch does nothing there, ONNX refuses the model."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.dim):
        source = node.args[0]
        if source.meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


ONNX = Saver("stepgraph-onnx", save_onnx)
