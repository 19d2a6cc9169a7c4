"""Single calls of variants as graphs: for pipelines and sessions, whose loop is somebody else's."""

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepgraph.errors import CaptureError
from stepgraph.runtime.capture.cudagraph import Recorder, ordinary_tensors, refuse_difference
from stepgraph.runtime.memory.arena import Place
from stepgraph.runtime.memory.slot_table import SlotMemory

Given = Mapping[Hashable, Tensor]


@dataclass(frozen=True)
class _Step:
    """A captured call: what replays it, and where its results are then."""

    replay: Callable[[], None]
    results: tuple[Tensor, ...]


class CapturedSteps:
    """The captured calls of a program, each captured when it is met for the second time, or at once.

    Inputs are copied into buffers, and so are tables and coefficients where they are other tensors than at the last call;
    stored values lie in memory that all calls share, so one run at a time can use them.

    Attributes:
        memory: Where stored values lie.
        refused: Why nothing is captured any more; empty where it is.
        programs: The program. While they are kept, no other one can lie at its address, by which they are found.
    """

    def __init__(
        self, recorder: Recorder, memory: SlotMemory, program: object, moves: Callable[[], int], at_once: bool
    ) -> None:
        # What runs once only does not pay for a capture.
        self._at_once, self._met = at_once, set[Hashable]()
        self.memory, self.refused = memory, ""
        self.programs: tuple[object, ...] = (program,)
        # How often weights have come to lie elsewhere.
        self._recorder, self._moves, self._captured_at = recorder, moves, moves()
        self._lock = threading.Lock()
        self._owner: weakref.ref[object] | None = None
        self._buffers: dict[Hashable, Tensor] = {}
        self._seen: dict[Hashable, tuple[Tensor, int]] = {}
        self._steps: dict[Hashable, _Step] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of stored values, and of the buffers of inputs and results."""
        results = [result for step in self._steps.values() for result in step.results]
        return self.memory.arena.memory.nbytes + sum(tensor.nbytes for tensor in (*self._buffers.values(), *results))

    def lease(self, owner: object) -> bool:
        """Take it for a run; False where another run has it, or nothing can be captured."""
        with self._lock:
            other = self._owner() if self._owner is not None else None
            if self.refused or (other is not None and other is not owner):
                return False
            self._owner = weakref.ref(owner)
            return True

    def release(self, owner: object) -> None:
        """The end of a run."""
        with self._lock:
            if self._owner is not None and self._owner() is owner:
                self._owner = None

    def refuse(self, reason: str) -> None:
        """Capture nothing any more, and give back what was captured; stored values stay where they are."""
        self.refused = reason
        self._steps.clear()
        self._buffers.clear()
        self._seen.clear()

    def valid(self) -> bool:
        """Whether the weights still lie where the graphs read them."""
        return self._captured_at == self._moves()

    def run(
        self,
        call: Hashable,
        stores: Sequence[Place],
        inputs: Given,
        tables: Given,
        work: Callable[[Given], Sequence[Tensor]],
    ) -> list[Tensor]:
        """Replay a call, or capture it.

        Args:
            call: What is called, and the places of the arena that it reads.
            stores: The places that it writes to.
            inputs: What callers gave, by name, and may write to unseen (`.data`, inference mode); the same names have the same
                shapes and dtypes at every call.
            tables: Likewise, all else that it reads; told by identity and version.
            work: Does it with both, inputs first, writes to the places, and gives the results.

        Returns:
            The results, in tensors of their own.

        Raises:
            CaptureError: It cannot be captured, or a replay gives something else.
        """
        with self._recorder.turn(), ordinary_tensors():
            self._load(inputs, tables)
            key = (call, tuple(stores), (*inputs, *tables))
            buffers = {name: self._buffers[name] for name in (*inputs, *tables)}
            if not self._at_once and key not in self._met:
                self._met.add(key)
                return [value.clone() for value in work(buffers)]
            if key not in self._steps:
                self._steps[key] = self._capture(lambda: work(buffers), stores)
            else:
                self._steps[key].replay()
            return [result.clone() for result in self._steps[key].results]

    def _load(self, inputs: Given, tables: Given) -> None:
        """Bring the buffers up to date; what is the last call's table, untouched, is there already."""
        values = dict(inputs)
        for name, value in tables.items():
            # Made in inference mode, it has no version, and is nobody else's.
            mark = (value, 0 if value.is_inference() else value._version)
            seen = self._seen.get(name)
            if seen is None or seen[0] is not value or seen[1] != mark[1]:
                values[name], self._seen[name] = value, mark
        for name in values.keys() - self._buffers.keys():
            self._buffers[name] = torch.empty_like(values[name], memory_format=torch.contiguous_format)
        torch._foreach_copy_([self._buffers[name] for name in values], list(values.values()))

    def _capture(self, work: Callable[[], Sequence[Tensor]], stores: Sequence[Place]) -> _Step:
        """Run the call as it is, capture it, and compare a replay with it."""
        # What a capture allocates does not last.
        values = self._recorder.warm_up(work)
        results = tuple(torch.empty_like(value, memory_format=torch.contiguous_format) for value in values)
        lasting = [*results, *(tensor for place in stores for tensor in self.memory.arena.tensors(place))]
        expected = [value.clone() for value in (*values, *lasting[len(results) :])]

        def captured() -> None:
            for result, value in zip(results, work(), strict=True):
                result.copy_(value)

        try:
            replay = self._recorder.record(captured)
        except RuntimeError as error:
            raise CaptureError(f"the step cannot be captured: {str(error).splitlines()[0]}") from error
        for tensor in lasting:
            tensor.zero_()
        replay()
        for tensor, value in zip(lasting, expected, strict=True):
            refuse_difference(tensor, value, "step")
        return _Step(replay, results)
