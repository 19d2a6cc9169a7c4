"""AOTInductor exports: the pt2 export with compiled programs, which Python or C++ runs on libtorch."""

from pathlib import Path
from typing import Any

import torch

from stepgraph.errors import CompileError
from stepgraph.runtime.export.pt2 import Saver, write_programs
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.session.compiled import Compiled

OPTIONS: dict[str, Any] = {
    # Weights are inputs; nothing else is to come into the libraries either.
    "aot_inductor.package_constants_in_so": False,
    # Else the number of threads of this process would be compiled in.
    "cpp.dynamic_threads": True,
}


def write_aoti(folder: Path, executable: Compiled, program: Program, *, scheduler: Any, portable: bool) -> dict[str, Any]:
    """Write compiled programs, weights and the runner; returns the schedule (see `stepgraph.runtime.export.export.export`)."""
    # Inductor takes most of the time that a process takes to start, and only those who compile with it need it.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if not portable:
        raise CompileError("portable=False keeps stepgraph's own operations, which libtorch alone does not have; leave it out")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompileError(f"the format 'aoti' needs a C++ compiler ({error}); install one, or export as pt2") from error
    return write_programs(folder, executable, program, scheduler=scheduler, portable=True, saver=AOTI)


def save_aoti(exported: torch.export.ExportedProgram, path: Path) -> None:
    """Compile a program for the device and the shapes of its inputs, and write it as a package without constants."""
    from torch._inductor import aoti_compile_and_package

    values = [node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")]
    exported.example_inputs = (tuple(values), {})
    aoti_compile_and_package(exported, package_path=str(path), inductor_configs=dict(OPTIONS))


AOTI = Saver("stepgraph-aoti", save_aoti)
