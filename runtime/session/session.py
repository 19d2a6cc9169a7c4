"""One sampling run of a compiled plan."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from stepgraph.checked import checked
from stepgraph.checks import check_flag, check_numbers, check_whole, is_finite, shown
from stepgraph.env import read_env
from stepgraph.errors import ArgumentError, CaptureError, CompileError, MismatchError
from stepgraph.inputs import flat_inputs, refuse_odd_tensors
from stepgraph.plan import CachePlan
from stepgraph.plan.liveness import Read, traffic
from stepgraph.plan.refuse_other import refuse_other_timesteps
from stepgraph.runtime.capture.cudagraph import ordinary_tensors
from stepgraph.runtime.memory.layout import Moves
from stepgraph.runtime.memory.slot_table import SlotMemory, SlotTable
from stepgraph.runtime.program.program import Program, Variant, program_key, refuse_nan
from stepgraph.runtime.program.tables import FixedTables, Tables
from stepgraph.runtime.session.begin_run import begin_run, follow_facts, refuse_changed_within
from stepgraph.runtime.session.follow_weights import finish_run, follow_weights, warn_of
from stepgraph.runtime.session.lease_captured_steps import LAUNCHED, lease_captured_steps
from stepgraph.runtime.session.run_state import BranchState, RunState
from stepgraph.wrapped_models import refuse_modes

if TYPE_CHECKING:
    from stepgraph.runtime.session.compiled import Compiled


class Session:
    """One sampling run: which step is next, and the values stored so far. Not shared between threads.

    Attributes:
        executable: What runs.
        begin: The plan's step with which the run begins; the run's own steps count from there.
        timesteps: The scheduler's timestep of every step of the run.
        checked: Whether what changed of the model is looked at when the run begins.
        around: Whether calls of the model itself end here (`begin_run`).
    """

    def __init__(
        self,
        executable: "Compiled",
        capture: bool = True,
        begin: int = 0,
        timesteps: Sequence[float] | None = None,
        checked: bool = True,
        around: bool = False,
    ) -> None:
        self.executable, self.capture, self.begin = executable, capture, begin
        self.checked, self.around = checked, around
        self.timesteps = _timesteps_of(executable.plan, begin, timesteps)
        warn_of(executable, refuse_other_timesteps(executable.plan, begin, self.timesteps, executable.config.strict))
        self._state = self._fresh_state()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a run is bound to the memory of its executable."""
        raise CompileError("a session is not copied or pickled; start a new one with Executable.session")

    def _fresh_state(self) -> RunState:
        return RunState([BranchState() for _ in self.executable.plan.header.branches], read_env().check)

    def reset(self) -> None:
        """Back to the first step; all stored values and their memory are dropped, and so is what `use_...` brought."""
        self._release()
        self._state = self._fresh_state()

    @property
    def step(self) -> int:
        """Which step is next."""
        return self._state.step

    @property
    def branch(self) -> int:
        """Which branch of the step is next."""
        return self._state.branch

    @property
    def finished(self) -> bool:
        """Whether every step has run."""
        return self.step == len(self.timesteps)

    @property
    def peak_slot_bytes(self) -> int:
        """The most bytes of stored values that were held so far."""
        return self._state.peak_slot_bytes

    @property
    def arena_bytes(self) -> int:
        """Bytes allocated for stored values and activations on the device."""
        return sum(memory.arena.memory.nbytes for memory in self._state.memory.values())

    @property
    def slot_bytes(self) -> int:
        """Bytes of the values held now, over all branches."""
        return sum(branch.slots.bytes for branch in self._state.branches if branch.slots is not None)

    @property
    def tables(self) -> tuple[Tables | FixedTables | None, ...]:
        """Of every branch, its tables; None before its first step, and where nothing is hoisted."""
        return tuple(branch.tables for branch in self._state.branches)

    @property
    def memory(self) -> dict[int, SlotMemory]:
        """The memory of the programs that run."""
        return self._state.memory

    @property
    def programs(self) -> tuple[Program, ...]:
        """The programs that have begun in this run."""
        programs = {id(branch.program): branch.program for branch in self._state.branches if branch.program is not None}
        return tuple(programs.values())

    @checked
    def use_memory(self, memory: Mapping[int, SlotMemory]) -> None:
        """Work in the memory of another session, which is over; before the first step."""
        self._state.memory = dict(memory)

    @checked
    def use_tables(self, tables: Sequence[FixedTables | None]) -> None:
        """Read the tables of every branch from there, in place of computing them; before the first step."""
        if len(tables) != len(self._state.branches):
            raise ArgumentError(
                f"there are {len(tables)} tables; expected one for each of {len(self._state.branches)} branches"
            )
        for branch, fixed in zip(self._state.branches, tables, strict=True):
            branch.tables = fixed

    @checked
    def use_constant(self, step: int, branch: int, number: int, coefficients: torch.Tensor) -> None:
        """Take other coefficients of a forecast than the executable's, in this run.

        Args:
            step: At which step.
            branch: In which branch.
            number: Of the step's constants.
            coefficients: [terms], or [terms, C], like the constant's own; they are copied.
        """
        check_whole("step", step, 0, len(self.timesteps) - 1)
        state = self._state.branches[self._checked_branch(branch)]
        constants = list(state.constants.get(step, self.executable.default.constants[step][branch]))
        check_whole("number", number, 0, len(constants) - 1, where=f" of step {step}'s constants")
        if coefficients.shape != constants[number].shape or not is_finite(coefficients):
            raise ArgumentError(f"coefficients is {shown(coefficients)}; expected finite values, {shown(constants[number])}")
        constants[number] = torch.empty_like(constants[number]).copy_(coefficients)
        state.constants[step] = tuple(constants)

    @checked
    def stored(self, branch: int) -> dict[Read, tuple[torch.Tensor, ...]]:
        """What the present step of a branch reads, by site, part and age, before it has run; not to be written to."""
        state = self._state.branches[self._checked_branch(branch)]
        program, table = state.program, state.slots
        if program is None or table is None or self.finished:
            return {}
        reads = traffic(program.plan, program.folded)[self.step].reads
        return {read: table.read(slot) for read, slot in zip(reads, program.slots.steps[self.step].reads, strict=True)}

    def _checked_branch(self, branch: int) -> int:
        check_whole("branch", branch, 0, len(self._state.branches) - 1)
        return branch

    def __call__(self, return_dict: bool = True, **inputs: Any) -> Any:
        """Run the next call of the plan: the next branch of this step, or the first of the next.

        Args:
            return_dict: False gives a plain tuple instead of the model's output class, as in diffusers.
            **inputs: The model's forward arguments.

        Raises:
            CompileError: The run is over, the inputs' shapes changed within it, or an input requires a gradient; or at the
                beginning, the model is another one than when it was compiled (`begin_run`).

        An exception inside a step resets the session, so that nothing stale is left.
        """
        check_flag("return_dict", return_dict)
        try:
            results, program = self._run({name: value for name, value in inputs.items() if value is not None})
        except BaseException:
            self.reset()
            raise
        return program.returned(results, return_dict)

    def _run(self, inputs: dict[str, Any]) -> tuple[list[torch.Tensor], Program]:
        if self.finished:
            raise CompileError(f"all {self.step} steps of the plan have run; start a new session")
        if self.checked:
            refuse_modes()
        refuse_odd_tensors(inputs)
        program, inputs = self._take_program(inputs), flat_inputs(inputs)
        slots = program.slots.steps[self.step]
        arguments = [inputs[name] for name in program.input_names]
        if torch.is_autocast_enabled(arguments[0].device.type):
            raise CompileError(
                "autocast is on, but the graphs were traced without it; convert the model to the lower precision and "
                "compile that"
            )
        if torch.is_grad_enabled():
            _refuse_gradients(dict(zip(program.input_names, arguments, strict=True)))
        if self.checked:
            self._state.numbers.look(program.table_rows, inputs)
        if self._state.check:
            refuse_nan(dict(zip(program.input_names, arguments, strict=True)), f"input of step {self.step}")
        table = self._table(program, arguments[0].device)
        variant = program.variants[program.rows[self.step]]
        moves = program.layout.steps[self.step][self.branch]
        with ordinary_tensors():
            table.begin(moves)
        with torch.no_grad():
            tables = self._hoisted_values(program, variant, inputs)
            constants = self._state.present.constants.get(self.step, program.constants[self.step][self.branch])
            outputs = self._call(program, table, moves, arguments, constants, tables)
        if self._state.check:
            refuse_nan({f"result {i}": value for i, value in enumerate(outputs)}, f"output of step {self.step}")
        for slot, value in zip(slots.stores, moves.stores, strict=True):
            table.hold(slot, value)
        self._state.peak_slot_bytes = max(self.peak_slot_bytes, self.slot_bytes)
        for slot in (*slots.frees, *(slot for slot, _ in moves.leave)):
            table.free(slot)
        self._advance()
        return outputs, program

    def _advance(self) -> None:
        """To the next branch, or the next step; at the end of the run its tables are told, and captured steps given back."""
        state = self._state
        state.branch = (state.branch + 1) % len(state.branches)
        state.step += state.branch == 0
        if self.finished:
            for tables in self.tables:
                if tables is not None:
                    tables.finish()
            self._release()
            if self.checked:
                state.numbers.finish()
                refuse_changed_within(self.executable, self.programs, state.moves)
            finish_run(self.executable, state.look)

    def _call(
        self,
        program: Program,
        table: SlotTable,
        moves: Moves,
        arguments: Sequence[torch.Tensor],
        constants: Sequence[torch.Tensor],
        tables: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Run this step's variant, from the slots it reads to the places of what it stores; a replay where that is captured."""
        row = program.rows[self.step]
        variant, reads = program.variants[row], program.slots.steps[self.step].reads
        places = [place for value in moves.stores for place in value]

        def work(*values: torch.Tensor) -> list[torch.Tensor]:
            stored = [tensor for slot in reads for tensor in table.read(slot)]
            outputs = variant.run([*values[: len(arguments)], *stored, *values[len(arguments) :]], places, table.arena)
            # The arena is written to again; what is returned is the caller's.
            return [value.clone() if table.arena.owns(value) else value for value in outputs]

        steps = self._state.captured.get(id(program))
        if steps is None or steps.refused:
            return work(*arguments, *constants, *tables)
        named: dict[Hashable, torch.Tensor] = dict(zip(program.input_names, arguments, strict=True))
        read: dict[Hashable, torch.Tensor] = {("constant", row, index): value for index, value in enumerate(constants)}
        read |= {("table", index): value for index, value in zip(variant.tables, tables, strict=True)}
        call = (row, tuple(map(table.places, reads)))
        try:
            return steps.run(call, places, named, read, lambda buffers: work(*buffers.values()))
        except (CaptureError, torch.OutOfMemoryError) as error:
            if self.executable.config.cuda_graphs:
                raise
            steps.refuse(str(error).splitlines()[0])
            self.executable.captured.decline(steps.refused, LAUNCHED)
        return work(*arguments, *constants, *tables)

    def _table(self, program: Program, device: torch.device) -> SlotTable:
        """The stored values of this branch; branches that run one program share its memory."""
        state, key = self._state, id(program)
        if state.present.slots is None:
            if key not in state.memory:
                steps = lease_captured_steps(self.executable, program, device, self) if self.capture else None
                if steps is not None:
                    state.captured[key] = steps
                state.memory[key] = steps.memory if steps is not None else SlotMemory.of(program.layout, device)
            state.present.slots = SlotTable(state.memory[key], program.slots.count, spoil=state.check)
        return state.present.slots

    def _release(self) -> None:
        """Let another run have the captured steps."""
        for steps in self._state.captured.values():
            steps.release(self)

    def _hoisted_values(self, program: Program, variant: Variant, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """The tables that a variant takes, as they are at this step."""
        if program.hoisted is None or not variant.tables:
            return []
        present = self._state.present
        if present.tables is None:
            batched = not self.executable.config.exact
            present.tables = Tables(program.hoisted, self.timesteps, batched)
            present.strengths = program.watch.versions
        elif isinstance(present.tables, Tables) and present.strengths != program.watch.versions:
            present.tables.forget()
            present.strengths = program.watch.versions
        values = present.tables.at(self.step, inputs)
        return [values[table] for table in variant.tables]

    def _take_program(self, inputs: dict[str, Any]) -> Program:
        """Take the program of this branch; stored values have the shapes of the one the run began with."""
        begun, key = self._state.present.program, program_key(inputs, self.begin)
        if self.checked and not self.programs:
            self.executable, program, self._state.look = begin_run(self.executable, inputs, self.begin, self.around)
            self._state.present.program, self._state.moves = program, self.executable.weights.moves
            self._state.present.key = key
            return program
        # A run goes on with its programs, also where they have made room for others.
        present = {branch.key: branch.program for branch in self._state.branches}
        program = present.get(key) or self.executable.find_program(inputs, self.begin)
        if begun is not None and program is not begun:
            raise CompileError(
                f"the inputs' shapes, dtypes or options changed within a run, at step {self.step} (batch {begun.batch} before, "
                f"{program.batch} now); start a new session"
            )
        if self.checked and all(program is not branch.program for branch in self._state.branches):
            follow_facts(self.executable, program)
            follow_weights(self.executable)
        elif self.checked and not program.watch.strengths_hold(self.executable.model):
            # As where a callback fades a LoRA out.
            follow_facts(self.executable, program)
        self._state.present.program, self._state.present.key = program, key
        return program


def _timesteps_of(plan: CachePlan, begin: int, timesteps: Sequence[float] | None) -> tuple[float, ...]:
    """The timesteps of a run that begins at a step of a plan: those that are given, or else the plan's.

    Raises:
        PlanError: The plan has no such step, a forecast reads what the run does not have, or the timesteps are not finite
            numbers, one for each of the run's steps.
    """
    check_whole("begin", begin, 0, plan.steps - 1, tail=f": the plan has steps 0 to {plan.steps - 1}")
    if begin and plan.forecasts:
        plan.tail(begin)
    if timesteps is None:
        return plan.header.timesteps[begin:]
    numbers, steps = tuple(check_numbers("timesteps", timesteps)), plan.steps - begin
    if len(numbers) != steps:
        raise MismatchError(
            f"timesteps are {len(numbers)}; expected {steps}, one for each step of a run that begins at step {begin} of "
            f"{plan.steps}; to begin later, pass begin="
        )
    return numbers


def _refuse_gradients(arguments: Mapping[str, torch.Tensor]) -> None:
    """Refuse inputs that gradients are wanted of: steps compute none, and a guidance by gradients would lose the model's.

    Raises:
        CompileError: The message names the input.
    """
    name = next((name for name, value in arguments.items() if value.requires_grad), None)
    if name is not None:
        raise CompileError(
            f"{name} requires a gradient, which executables do not compute; detach it, or call in torch.no_grad(), or, for a "
            f"guidance by gradients, detach the executable and let the model answer"
        )
