"""The compiled programs of a plan, from which sessions are made."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from stepgraph.checked import checked
from stepgraph.checks import check_whole
from stepgraph.config import CompileConfig
from stepgraph.env import get_logger
from stepgraph.errors import CompileError
from stepgraph.packed_weights import forget_packed
from stepgraph.plan import CachePlan
from stepgraph.runtime.capture.captured import Captured
from stepgraph.runtime.program.bound_weights import BoundWeights
from stepgraph.runtime.program.program import Macs, Memory, Program, program_key, zero_inputs
from stepgraph.runtime.session.follow_weights import follow_weights, watch_tensors
from stepgraph.runtime.session.session import Session
from stepgraph.runtime.session.siblings import Siblings, put_on, suited
from stepgraph.weight_kinds import weight_bytes

# Of how many beginnings above 0 programs are kept; and for how many signatures (batch sizes) each, beside the default.
TAILS, SIGNATURES = 8, 8


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
        build: Makes the program of a model and a plan (this one, or the rest of it) for inputs of a signature.
        example: The inputs it was compiled with, for saving, as `described` has them.
        factors: The low-rank factors it was compiled with, for saving.
        weights: The model's parameters and buffers, and what has become of them since.
        changed: What adapters have made other than when the plan was compiled, as the beginning of a sentence; empty where
            nothing is.
        captured: What was captured of it in graphs.
        siblings: The same plan for the model with other adapters.
    """

    model: nn.Module
    plan: CachePlan
    config: CompileConfig
    build: Callable[[nn.Module, Mapping[str, Any], CachePlan], Program]
    weights: BoundWeights
    _default: Program | None = None
    example: Mapping[str, Any] | None = None
    factors: Saves | None = None
    _programs: dict[tuple[Any, ...], Program] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    changed: str = ""
    captured: Captured = field(default_factory=Captured, repr=False)
    siblings: Siblings = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "siblings", Siblings(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a program is bound to the memory of its model's weights."""
        raise CompileError(
            "an executable is not copied or pickled: save it with Executable.save and read it with stepgraph.load, or put it "
            "on another model with Executable.on"
        )

    def __repr__(self) -> str:
        """Model, plan and backend in one line."""
        header, variants = self.plan.header, len(self.default.variants)
        plan = f"{header.policy} plan of {self.plan.steps} steps"
        return f"<Executable: {header.model}, {plan}, {variants} variants, {self.config.backend}>"

    @checked
    def session(
        self, capture: bool = True, begin: int = 0, timesteps: Sequence[float] | None = None, around: bool = False
    ) -> "Session":
        """A fresh run of the plan, with no stored values.

        Args:
            capture: Whether its calls may be replays of CUDA graphs (`CompileConfig.cuda_graphs`). One run at a time has
                them; others launch every kernel.
            begin: The plan's step with which the run begins (`CachePlan.tail`); what it would read of earlier ones is
                computed.
            timesteps: The scheduler's, of every step of the run, where they are not the plan's. A plan that measured nothing
                takes any; one whose choice was measured says so once, or refuses if the executable is strict.
            around: Whether calls of the model itself end here, so that its own hooks have run.

        Raises:
            PlanError: The plan has no such step, a forecast reads what the run does not have, or the timesteps are not finite
                numbers, one for each step of the run; or the plan computes with coefficients that are for its own.
        """
        return Session(self, capture, begin, timesteps, around=around)

    @property
    def default(self) -> Program:
        """The program for the inputs that the plan was compiled with."""
        if self._default is None:
            device = next(self.model.parameters()).device
            object.__setattr__(self, "_default", self.program(zero_inputs(self.example or {}, device)))
        assert self._default is not None
        return self._default

    @property
    def programs(self) -> list[Program]:
        """All programs that are compiled, the default's first."""
        programs = (self._default, *self._programs.values())
        return list({id(program): program for program in programs if program is not None}.values())

    @checked
    def on(self, model: nn.Module) -> "Compiled":
        """The same plan and programs on another model of the same structure, such as a copy.

        Nothing is traced, unless the model has other adapters than any that there are programs for.

        Raises:
            CompileError: The model is made of other parts, or its weights have another dtype, device, shape or strides.
            MismatchError: Its weights hold other values, which the plan does not follow.
        """
        if model is self.model:
            return self
        return put_on(self, model)

    def verify(self) -> tuple[str, ...]:
        """Read every weight in full, and follow what no run has noticed: single values that were written through `.data`.

        Returns:
            Names of the weights that hold other values than the last run, or `verify`, saw. Copies of them are made again at
            the next run, which is right then.

        Raises:
            CompileError: A weight is gone, new, or of another dtype, device, shape or strides.
            MismatchError: The plan does not follow other values.
        """
        return follow_weights(suited(self), everything=True).written

    @checked
    def program(self, inputs: Mapping[str, Any], begin: int = 0) -> Program:
        """The program for inputs of this signature; compiled when it is met, and kept while it is among the last `SIGNATURES`.

        Args:
            inputs: The forward's arguments.
            begin: The plan's step with which the run begins. Programs of the last `TAILS` such steps above 0 are kept.

        Raises:
            PlanError: Shapes (apart from the batch) or dtype differ from what the plan was made for.
            CompileError: The inputs are on another device than the model.
        """
        return self.find_program(inputs, begin)

    def find_program(self, inputs: Mapping[str, Any], begin: int) -> Program:
        """See `program`; for sessions, which ask at every call and whose arguments have names."""
        key, dropped = program_key(inputs, begin), list[Program]()
        # What is there is found without the lock: runs of other sizes do not wait for one that is compiled.
        program = self._programs.get(key)
        if program is not None:
            return program
        with self._lock:
            if key not in self._programs:
                started = time.perf_counter()
                # All programs hold the same tensors, so that all of them can follow.
                follow_weights(self)
                plan = self.plan.tail(begin)
                program = self.build(self.model, inputs, plan)
                dropped = self._make_room(begin)
                watch_tensors(self, program)
                self._programs[key] = program
                self._log_compiled(inputs, plan, begin, time.perf_counter() - started)
            program = self._programs[key]
        # Without the lock: a capture holds the other one while it asks for programs.
        for old in dropped:
            self.captured.forget(old)
        return program

    def known(self, inputs: Mapping[str, Any] | None, begin: int) -> Program:
        """A compiled program: the one for these inputs, where there is one, else any."""
        program = None if inputs is None else self._programs.get(program_key(inputs, begin))
        return self.programs[0] if program is None else program

    def _make_room(self, begin: int) -> list[Program]:
        """Drop the programs of the oldest beginning and the oldest for a beginning where there are too many of them.

        Returns:
            What was dropped.
        """
        begin, whole = begin + self.plan.header.schedule.begin, self.plan.header.schedule.begin
        begins = list(dict.fromkeys(program.begin for program in self._programs.values() if program.begin != whole))
        old = []
        if begin not in (whole, *begins) and len(begins) >= TAILS:
            old = [key for key, program in self._programs.items() if program.begin == begins[0]]
        same = [key for key, one in self._programs.items() if one.begin == begin and one is not self._default]
        old += same[: max(0, len(same) + 1 - SIGNATURES)]
        if old:
            get_logger("executable").info("%d programs, the oldest, make room", len(old))
        return [self._programs.pop(key) for key in old]

    def _log_compiled(self, inputs: Mapping[str, Any], plan: CachePlan, begin: int, seconds: float) -> None:
        shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        log = get_logger("executable")
        if len(self._programs) == 1 and self.changed:
            log.warning("compiled for the model's adapters as they are, in %.1f s: %s", seconds, self.changed)
            return
        if not begin:
            log.warning("compiled for inputs of other shapes, %s, in %.1f s", shapes, seconds)
            return
        more = sum(new != old for row, planned in zip(plan.rows, self.plan.rows[begin:]) for new, old in zip(row, planned))
        log.warning(
            "compiled for runs that begin at step %d of %d, in %.1f s: %d values that the plan reads of earlier steps, or "
            "leaves out for these, are computed", begin, self.plan.steps, seconds, more,
        )  # fmt: skip

    def repack(self) -> None:
        """Pack weights anew at their next use. Runs do so themselves where values have changed; see `verify`."""
        forget_packed(self.weights.tensors)

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

    @checked
    def print_readable(self, step: int) -> str:
        """The Python source of the graph that a step runs, with shapes and dtypes."""
        check_whole("step", step, 0, self.plan.steps - 1, tail=f": the plan has steps 0 to {self.plan.steps - 1}")
        source: str = self.default.variants[self.default.rows[step]].graph.print_readable(print_output=False)
        return source
