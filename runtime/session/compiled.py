"""The compiled programs of a plan, from which sessions are made."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from stepgraph.config import CompileConfig
from stepgraph.env import get_logger
from stepgraph.plan import CachePlan
from stepgraph.runtime.capture.captured import Captured
from stepgraph.runtime.program.packed_linear import forget_packed
from stepgraph.runtime.program.program import Macs, Memory, Program, signature
from stepgraph.runtime.session.session import Session
from stepgraph.weight_kinds import weight_bytes


class Saves(Protocol):
    """What writes itself into a file, as low-rank factors do."""

    def save(self, path: str | Path) -> None:
        """Write the file."""


@dataclass(frozen=True, eq=False, repr=False)
class Compiled:
    """What an `Executable` is to whoever runs it. Immutable: whatever changes while it runs lives in a `Session`.

    Attributes:
        model: The model, whose weights the programs use by reference.
        plan: The plan.
        config: The compile options.
        build: Makes the program for inputs of a new signature (another batch size, say).
        default: The program for the inputs it was compiled with.
        example: The inputs it was compiled with, for saving, as `described` has them.
        factors: The low-rank factors it was compiled with, for saving.
        captured: What was captured of it in graphs.
    """

    model: nn.Module
    plan: CachePlan
    config: CompileConfig
    build: Callable[[Mapping[str, Any]], Program]
    default: Program
    example: Mapping[str, Any] | None = None
    factors: Saves | None = None
    _programs: dict[tuple[Any, ...], Program] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    captured: Captured = field(default_factory=Captured, repr=False)

    def __repr__(self) -> str:
        """Model, plan and backend in one line."""
        header, variants = self.plan.header, len(self.default.variants)
        plan = f"{header.policy} plan of {self.plan.steps} steps"
        return f"<Executable: {header.model}, {plan}, {variants} variants, {self.config.backend}>"

    def session(self, capture: bool = True, model: nn.Module | None = None) -> "Session":
        """A fresh run of the plan, with no stored values.

        Args:
            capture: Whether its calls may be replays of CUDA graphs (`CompileConfig.cuda_graphs`). One run at a time has
                them; others launch every kernel.
            model: Another model of equal weights that it stands in for.
        """
        return Session(self, capture, model)

    def program(self, inputs: Mapping[str, Any]) -> Program:
        """The program for inputs of this signature; compiled when it is met for the first time.

        Raises:
            PlanError: Shapes (apart from the batch) or dtype differ from what the plan was made for.
            CompileError: The inputs are on another device than the model.
        """
        key = signature(inputs)
        # What is there is found without the lock: runs of other sizes do not wait for one that is compiled.
        program = self._programs.get(key)
        if program is not None:
            return program
        with self._lock:
            if key not in self._programs:
                started = time.perf_counter()
                self._programs[key] = self.build(inputs)
                shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
                log = get_logger("executable")
                log.warning("compiled for inputs of other shapes, %s, in %.1f s", shapes, time.perf_counter() - started)
            return self._programs[key]

    def repack(self) -> None:
        """Pack weights anew at their next use: after writes that torch does not count, as those through `.data` are not."""
        forget_packed()

    def macs(self) -> Macs:
        """Multiply-accumulates of a run, counted on the specialised graphs."""
        program, branches = self.default, len(self.plan.header.branches)
        per_step = tuple(program.variants[i].macs * branches for i in program.rows)
        return Macs(sum(per_step), program.macs_total * branches * len(per_step), per_step)

    def memory(self) -> Memory:
        """Bytes of stored values and weights of a run, known before it runs."""
        slots, layout, branches = self.default.slots, self.default.layout, len(self.plan.header.branches)
        weights = sum(map(weight_bytes, self.model.parameters())) + self.default.factor_bytes
        tables = self.default.hoisted.bytes * branches if self.default.hoisted is not None else 0
        return Memory(
            layout.peak_bytes, slots.count * branches, slots.stored * branches, weights, tables, layout.nbytes,
            layout.work_bytes, layout.host_bytes,
        )  # fmt: skip

    def providers(self) -> dict[str, int]:
        """Calls of fused operations in one branch of a run: "<op> by <provider>" -> number of calls."""
        calls: Counter[str] = Counter()
        for variant in (self.default.variants[i] for i in self.default.rows):
            calls.update(variant.providers)
        return dict(sorted(calls.items()))

    def print_readable(self, step: int) -> str:
        """The Python source of the graph that a step runs, with shapes and dtypes."""
        if not 0 <= step < self.plan.steps:
            raise IndexError(f"step {step} is out of range: the plan has steps 0 to {self.plan.steps - 1}")
        source: str = self.default.variants[self.default.rows[step]].graph.print_readable(print_output=False)
        return source
