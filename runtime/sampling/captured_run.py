"""A whole sampling run as one graph: every model call, guidance and the scheduler's steps, from buffers that stay."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepgraph.errors import CaptureError
from stepgraph.runtime.capture.cudagraph import Recorder, ordinary_tensors, refuse_difference
from stepgraph.runtime.program.bound_weights import Look
from stepgraph.runtime.program.tables import FixedTables, Tables
from stepgraph.runtime.sampling.loop import Loop
from stepgraph.runtime.sampling.update import FusedUpdate
from stepgraph.runtime.session.begin_run import follow_facts, refuse_around
from stepgraph.runtime.session.compiled import Compiled
from stepgraph.runtime.session.follow_weights import finish_run
from stepgraph.runtime.session.session import Session


class CapturedRun:
    """One run of an executable, captured: called with noise and conditioning, it replays.

    Latents and conditioning are copied into buffers of its own, and the result out of one, so that callers on several threads
    take turns. Tables are a graph of their own; both are replayed in every run, for conditioning may be written to unseen.

    Attributes:
        programs: That it runs.
    """

    def __init__(
        self,
        executable: Compiled,
        loop: Loop,
        update: FusedUpdate,
        recorder: Recorder,
        noise: Tensor,
        calls: Sequence[Mapping[str, Any]],
    ) -> None:
        """Run the loop, capture it, and compare a replay with it.

        Args:
            executable: What to run.
            loop: Its schedule.
            update: The run's, which reads nothing on the host; every pass over the run is one with the same coefficients.
            recorder: Of the noise's device.
            noise: [B, C, ...].
            calls: See `Loop.run`.

        Raises:
            CaptureError: The run cannot be captured, or a replay's result is another.
        """
        # It holds coefficients that the graph reads.
        self._executable, self._loop, self._recorder, self._update = executable, loop, recorder, update
        self._moves = executable.weights.moves
        with recorder.turn(), ordinary_tensors():
            self._noise = noise.clone(memory_format=torch.contiguous_format)
            self._calls = [{name: _own(value) for name, value in call.items()} for call in calls]
            session, shared = loop_session(executable, loop, checked=False), executable.captured.run_memory
            session.use_memory(dict(shared))
            expected = recorder.warm_up(lambda: loop.run(session, update.at_first_step(), self._noise, self._calls))
            self._result, self._memory = torch.empty_like(expected), session.memory
            self.programs = session.programs
            shared.update(self._memory)
            self._tables = self._fixed_tables(session.tables)
            self._capture()
            self._compare(expected)

    def _fixed_tables(self, tables: Sequence[Tables | FixedTables | None]) -> list[FixedTables | None]:
        """The tables that a run has computed, for every branch, in buffers."""
        rows = self._noise.shape[0] * (2 if self._loop.doubled else 1)
        timestep = self._loop.timesteps[:1].expand(rows)
        return [
            computed.fixed({**inputs, "timestep": timestep}) if isinstance(computed, Tables) else None
            for computed, inputs in zip(tables, self._calls, strict=True)
        ]

    def _capture(self) -> None:
        """Warm up exactly what is captured, then capture it; a recorder may run it any number of times."""
        self._recorder.warm_up(self._compute_tables)
        self._recorder.warm_up(self._run)
        try:
            self._replay_tables = self._recorder.record(self._compute_tables)
            self._replay = self._recorder.record(self._run)
        except RuntimeError as error:
            raise CaptureError(f"the run cannot be captured: {str(error).splitlines()[0]}") from error

    def _compute_tables(self) -> None:
        with torch.no_grad():
            for tables in self._tables:
                if tables is not None:
                    tables.compute()

    def _run(self) -> None:
        session = loop_session(self._executable, self._loop, checked=False)
        session.use_memory(self._memory)
        session.use_tables(self._tables)
        self._result.copy_(self._loop.run(session, self._update.at_first_step(), self._noise, self._calls))

    def _compare(self, expected: Tensor) -> None:
        """Replay, and refuse what the loop did not give."""
        self._result.zero_()
        self._replay_tables()
        self._replay()
        refuse_difference(self._result, expected, "run")

    def __call__(self, noise: Tensor, calls: Sequence[Mapping[str, Any]], look: Look) -> Tensor:
        """Replay the run.

        Args:
            noise: As at the capture.
            calls: See `Loop.run`.
            look: What `follow_weights` found of the weights; where the device finds more, the run is replayed once more.

        Returns:
            Latents [B, C, ...] of their own.
        """
        # A model that has changed is followed or refused as by every run.
        for program in self.programs:
            follow_facts(self._executable, program)
            refuse_around(self._executable, program)
        with self._recorder.turn(), torch.no_grad():
            self._noise.copy_(noise)
            for buffers, call in zip(self._calls, calls, strict=True):
                for name, value in call.items():
                    if isinstance(value, Tensor):
                        buffers[name].copy_(value)
            self._replay_tables()
            self._replay()
            if finish_run(self._executable, look).written:
                # The tables were those of the weights as they had been.
                self._replay_tables()
                self._replay()
            return self._result.clone()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of latents, conditioning, result and tables; stored values lie in memory that runs share."""
        inputs = [value for call in self._calls for value in call.values() if isinstance(value, Tensor)]
        tables = sum(one.nbytes for one in self._tables if one is not None)
        return tables + sum(tensor.nbytes for tensor in (self._noise, self._result, *inputs))

    def valid(self) -> bool:
        """Whether the weights still lie where the graph reads them."""
        return self._moves == self._executable.weights.moves


def loop_session(executable: Compiled, loop: Loop, capture: bool = False, checked: bool = True) -> Session:
    """A session of a loop's run, with graphs of its steps where that is wished for (`Session`)."""
    begin = loop.begin - executable.plan.header.schedule.begin
    if checked:
        return executable.session(capture, begin, loop.planned)
    return Session(executable, capture, begin, loop.planned, checked=False)


def _own(value: Any) -> Any:
    """A tensor in a buffer of its own; anything else as it is."""
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
