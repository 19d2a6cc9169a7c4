"""What changes in the course of a sampling run."""

from dataclasses import dataclass, field
from typing import Any

import torch

from stepgraph.runtime.capture.captured_steps import CapturedSteps
from stepgraph.runtime.memory.slot_table import SlotMemory, SlotTable
from stepgraph.runtime.program.bound_weights import Look
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.program.tables import FixedTables, Tables
from stepgraph.runtime.session.row_numbers import RowNumbers


@dataclass
class BranchState:
    """What a run holds of one branch.

    Attributes:
        program: What the branch runs; none before its first step.
        key: What it is the program for.
        slots: Its stored values; none before its first step.
        tables: What is computed before the loop; none before its first step, and where nothing is hoisted.
        constants: Per step, coefficients of forecasts that stand in for the program's.
        strengths: How often strengths had been written when the tables were computed.
    """

    program: Program | None = None
    key: tuple[Any, ...] = ()
    slots: SlotTable | None = None
    tables: Tables | FixedTables | None = None
    constants: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    strengths: tuple[int, ...] = ()


@dataclass
class RunState:
    """What a run holds; a new run begins with a new one.

    Attributes:
        branches: Per branch of the plan.
        check: Whether values are looked at (STEPGRAPH_CHECK=1).
        step: Which step is next.
        branch: Which branch of it.
        memory: By program, where its stored values lie.
        captured: By program, the captured steps that the run has for itself.
        look: What was found of the weights when the run began.
        moves: How often weights had been others, or elsewhere, until the run began.
        numbers: The class labels, and their like, that it was given.
        peak_slot_bytes: The most bytes of stored values so far.
    """

    branches: list[BranchState]
    check: bool
    step: int = 0
    branch: int = 0
    memory: dict[int, SlotMemory] = field(default_factory=dict)
    captured: dict[int, CapturedSteps] = field(default_factory=dict)
    look: Look = field(default_factory=Look)
    moves: int = 0
    numbers: RowNumbers = field(default_factory=RowNumbers)
    peak_slot_bytes: int = 0

    @property
    def present(self) -> BranchState:
        """The branch that is next."""
        return self.branches[self.branch]
