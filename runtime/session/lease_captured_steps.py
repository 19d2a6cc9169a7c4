"""Lease the captured steps of a program for one run."""

from typing import TYPE_CHECKING

import torch

from stepgraph.config import CompileConfig
from stepgraph.env import get_logger
from stepgraph.errors import CompileError
from stepgraph.runtime.capture.captured import LIMITS
from stepgraph.runtime.capture.captured_steps import CapturedSteps
from stepgraph.runtime.capture.cudagraph import RECORDERS, why_not
from stepgraph.runtime.memory.slot_table import SlotMemory
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.program.tables import waits

if TYPE_CHECKING:
    from stepgraph.runtime.session.compiled import Compiled

LAUNCHED = "its kernels are launched one by one"


def wants_graphs(config: CompileConfig, device: torch.device) -> bool:
    """Whether graphs are wished for: as it was asked, else where launches take time of a host that does not wait for them."""
    if config.cuda_graphs is None:
        return not config.exact and waits(device) and device.type in RECORDERS
    return config.cuda_graphs


def lease_captured_steps(executable: "Compiled", program: Program, device: torch.device, run: object) -> CapturedSteps | None:
    """The captured steps of a program, for a run that nobody shares them with; they have memory of their own.

    Returns:
        None where none are wished for or to be had, and where another run has them.

    Raises:
        CompileError: They are asked for, and nothing can be captured here.
    """
    config, captured = executable.config, executable.captured
    if not wants_graphs(config, device):
        return None
    reason = why_not(device)
    if reason and config.cuda_graphs:
        raise CompileError(f"cuda_graphs=True, but {reason}; leave it out to launch every kernel")
    if reason:
        captured.decline(reason, LAUNCHED)
        return None

    def make() -> CapturedSteps:
        memory = SlotMemory.of(program.layout, device)
        get_logger("capture").info(
            "the calls of runs of batch %d are captured as they come, with %.1f MB for stored values; those of the last %d "
            "programs are kept", program.batch, memory.arena.memory.nbytes / 1e6, LIMITS["steps"],
        )  # fmt: skip
        return CapturedSteps(
            captured.recorder(device), memory, program, lambda: executable.weights.moves, bool(config.cuda_graphs)
        )

    attempt = captured.obtain(("steps", id(program)), make, CapturedSteps.valid, at_once=True)
    if attempt.capture is None:
        captured.decline(attempt.refusal, LAUNCHED)
        return None
    if attempt.capture.lease(run):
        return attempt.capture
    if not attempt.capture.refused:
        captured.decline("another run has the graphs of these calls, and has not ended", f"meanwhile {LAUNCHED}")
    return None
