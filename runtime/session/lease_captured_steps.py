"""Lease the captured steps of a program for one run."""

from typing import TYPE_CHECKING

import torch

from stepgraph.errors import CompileError
from stepgraph.runtime.capture.captured_steps import CapturedSteps
from stepgraph.runtime.capture.cudagraph import why_not
from stepgraph.runtime.memory.slot_table import SlotMemory
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.program.tables import waits

if TYPE_CHECKING:
    from stepgraph.runtime.session.compiled import Compiled


def lease_captured_steps(executable: "Compiled", program: Program, device: torch.device, run: object) -> CapturedSteps | None:
    """The captured steps of a program, for a run that nobody shares them with; they have memory of their own.

    Returns:
        None where none are wished for or to be had, and where another run has them.

    Raises:
        CompileError: They are asked for, and nothing can be captured here.
    """
    config = executable.config
    wish = not config.exact and waits(device) if config.cuda_graphs is None else config.cuda_graphs
    if not wish:
        return None
    reason = why_not(device)
    if reason and config.cuda_graphs:
        raise CompileError(f"cuda_graphs=True, but {reason}; leave it out to launch every kernel")
    if reason:
        return None

    def make() -> CapturedSteps:
        recorder = executable.captured.recorder(device)
        memory = SlotMemory.of(program.layout, device)
        steps = CapturedSteps(recorder, memory, lambda: executable.weights.moves, bool(config.cuda_graphs))
        # While they are kept, no other program can lie at its address, by which they are found.
        steps.program = program
        return steps

    steps = executable.captured.obtain(("steps", id(program)), make, CapturedSteps.valid, at_once=True).capture
    return steps if steps is not None and steps.lease(run) else None
