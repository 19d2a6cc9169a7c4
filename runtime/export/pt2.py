"""pt2 exports: a torch.export program per variant, weights once, the schedule table, and a runner that needs torch alone."""

import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from stepgraph.env import get_logger
from stepgraph.errors import CompileError
from stepgraph.files.whole_file import save_tensors
from stepgraph.runtime.export import runner
from stepgraph.runtime.export.schedule import inputs_of, make_schedule, variant_name
from stepgraph.runtime.export.weight_names import WeightNames
from stepgraph.runtime.export.weightless_graph import WeightlessGraph
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.session.compiled import Compiled

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Saver:
    """How programs are written.

    Attributes:
        format: What the schedule calls it; one of `runner.FORMATS`.
        save: (program, path) -> None.
    """

    format: str
    save: Callable[[torch.export.ExportedProgram, Path], None]


PT2 = Saver("stepgraph-pt2", torch.export.save)


def write_programs(
    folder: Path, executable: Compiled, program: Program, *, scheduler: Any, portable: bool, saver: Saver = PT2
) -> dict[str, Any]:
    """Write programs, weights and the runner; returns the schedule (see `stepgraph.runtime.export.export.export`)."""
    if executable.config.slot_dtype is not None:
        raise CompileError(
            f"slot_dtype is {executable.config.slot_dtype!r}, but an export keeps stored values in their own dtype; compile "
            f"without slot_dtype to export"
        )
    names = WeightNames(executable.model)
    table = {"format": saver.format, "version": runner.VERSION, "weights": WEIGHTS, **_versions()}
    table |= make_schedule(executable, program, names, scheduler)
    writer = ProgramWriter(folder, names, saver)
    for index, variant in enumerate(program.variants):
        writer.write(variant_name(index), WeightlessGraph(variant.graph, names, portable=portable))
    table["tables"] = write_tables(writer, executable, program)
    table["programs"] = writer.programs
    save_tensors(folder / WEIGHTS, own_memory(names.tensors))
    files = [WEIGHTS, *(program["file"] for program in writer.programs.values())]
    table["sha256"] = {file: runner.sha256_of(folder / file) for file in files}
    shutil.copyfile(runner.__file__, folder / "run.py")
    return table


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("stepgraph", "torch", "diffusers")}


class ProgramWriter:
    """Writes programs into a folder and notes what they take.

    Args:
        folder: Where to.
        names: Of the weights.
        saver: How they are written.
    """

    def __init__(self, folder: Path, names: WeightNames, saver: Saver) -> None:
        self.folder, self.names, self.saver = folder, names, saver
        self.programs: dict[str, dict[str, Any]] = {}
        (folder / "programs").mkdir()

    def weights_of(self, graph: WeightlessGraph) -> list[Tensor]:
        """The weights that a graph takes, contiguous as the file has them: compiled programs hold to the strides."""
        return [self.names.tensors[name].contiguous() for name in graph.weights]

    def write(
        self, name: str, graph: WeightlessGraph, examples: Sequence[Tensor] | None = None, module: nn.Module | None = None
    ) -> None:
        """Export a graph and write it.

        Args:
            name: Of the program.
            graph: The graph.
            examples: Of its inputs, where the graph does not know them.
            module: What is exported, if more than the graph itself: (*inputs, *weights) -> flat tuple of tensors.
        """
        examples = graph.examples() if examples is None else examples
        with torch.no_grad():
            exported = torch.export.export(module or graph, (*examples, *self.weights_of(graph)), strict=False)
        file = f"programs/{name}{runner.FORMATS[self.saver.format]}"
        self.saver.save(stripped(exported), self.folder / file)
        self.programs[name] = {"file": file, "inputs": len(examples), "weights": list(graph.weights)}


def stripped(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A program without what running it does not need: example inputs, weights among them, and where its lines came from."""
    # Also a list of no tensors, such as the rest of one coefficient, which can be written but not read again.
    exported.graph.eliminate_dead_code()
    for node in exported.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    exported._example_inputs = None
    return exported


def every_step(graph: WeightlessGraph, examples: Sequence[Tensor], inputs: int) -> nn.Module:
    """A graph of one step as one of all: (timesteps [T, ...], *inputs, *weights) -> tensors [T, ...].

    Traced by make_fx, to whose operations the mapping leaves no trace; torch.export would keep it as operations of its own.
    """
    fixed = inputs - 1

    def mapped(every: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        def one(timestep: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            return tuple(graph(timestep, *given, *rest[fixed:]))

        return torch.vmap(one, in_dims=(0, *[None] * fixed))(every, *rest[:fixed])

    with torch.no_grad():
        from torch.fx.experimental.proxy_tensor import make_fx

        return make_fx(mapped, tracing_mode="fake")(*examples)


def write_tables(writer: ProgramWriter, executable: Compiled, program: Program) -> dict[str, Any]:
    """Write the programs of what is computed before the loop; returns what the schedule says of them."""
    hoisted, inputs = program.hoisted, inputs_of(program)
    if hoisted is None or not hoisted.tables:
        return {"inputs": [], "batched": False}
    fixed = [_zeros(inputs[name]) for name in hoisted.inputs]
    prompt, timestep = (WeightlessGraph(_graph_of(call), writer.names) for call in (hoisted.prompt, hoisted.timestep))
    # A limit may leave nothing at prompt level, and a program without results cannot be written.
    if prompt.results():
        writer.write("prompt", prompt, fixed)
    if not any(table.per_step for table in hoisted.tables):
        return {"inputs": list(hoisted.inputs), "batched": False}
    examples = [_zeros(inputs["timestep"]), *fixed, *(_zeros(value) for value in prompt.results())]
    batched = not executable.config.exact and _write_every_step(writer, timestep, examples, executable.plan.steps)
    if not batched:
        writer.write("timestep", timestep, examples)
    return {"inputs": list(hoisted.inputs), "batched": batched}


def _write_every_step(writer: ProgramWriter, timestep: WeightlessGraph, examples: Sequence[Tensor], steps: int) -> bool:
    """All steps in one call, where the graph can be mapped over them."""
    every = (examples[0].new_zeros((steps, *examples[0].shape)), *examples[1:])
    try:
        mapped = every_step(timestep, (*every, *writer.weights_of(timestep)), len(every))
    except RuntimeError as error:
        get_logger("export").info("no batch of all steps, so one after the other: %s", error)
        return False
    writer.write("timestep", timestep, every, mapped)
    return True


def _graph_of(call: Any) -> fx.GraphModule:
    """The graph that a bound forward runs."""
    gm: fx.GraphModule = call.__self__
    return gm


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, as safetensors needs them."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if place in seen or plain.untyped_storage().nbytes() != plain.nbytes else plain
        seen.add(apart[name].untyped_storage().data_ptr())
    return apart
