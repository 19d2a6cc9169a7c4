"""Single calls of variants as graphs: for pipelines and sessions, whose loop is somebody else's."""

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepgraph.liveness import VALUE
from stepgraph.runtime.cudagraph import CaptureError, Recorder, addresses, ordinary_tensors, refuse_difference
from stepgraph.runtime.slots import Narrow, SlotTable

Kept = tuple[Tensor | Narrow, ...]
Given = Mapping[Hashable, Tensor]


class FixedSlots(SlotTable):
    """Slots whose values are copied to places that stay: one for every slot and kind of value in it."""

    def __init__(self, count: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(count, dtype)
        self._places: dict[Hashable, Kept] = {}

    def store(self, slot: int, value: Sequence[Tensor], part: str = VALUE) -> None:
        """See `SlotTable`."""
        kept = tuple(self._kept(tensor, part) for tensor in value)
        key = (slot, tuple((tensor.shape, tensor.dtype) for tensor in _tensors(kept)))
        if key not in self._places:
            self._places[key] = tuple(_like(one) for one in kept)
        for place, tensor in zip(_tensors(self._places[key]), _tensors(kept), strict=True):
            place.copy_(tensor)
        self.hold(slot, self._places[key])

    def hold(self, slot: int, kept: Kept) -> None:
        """Say that a slot's value is in these places."""
        self._values[slot] = kept
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def held(self, slots: Sequence[int]) -> tuple[Kept, ...]:
        """The places of slots' values."""
        return tuple(value for slot in slots if (value := self._values[slot]) is not None)

    def clear(self) -> None:
        """Forget all values, and keep the places."""
        self._values = [None] * len(self._values)


@dataclass(frozen=True)
class _Step:
    """A captured call: what replays it, where its results are then, and where what it stores."""

    replay: Callable[[], None]
    results: tuple[Tensor, ...]
    stores: Mapping[int, Kept]


class CapturedSteps:
    """The captured calls of one branch of a program, each captured when it is met for the second time, or at once.

    Inputs, tables and coefficients are copied into buffers where they are other tensors than at the last call; stored values
    lie in places that all calls share, so one run at a time can use them.
    """

    def __init__(self, recorder: Recorder, slots: FixedSlots, model: nn.Module, at_once: bool) -> None:
        # What runs once only does not pay for a capture.
        self._at_once, self._met = at_once, set[Hashable]()
        self.slots, self.refused = slots, ""
        self._recorder, self._model, self._weights = recorder, model, addresses(model)
        self._lock = threading.Lock()
        self._owner: weakref.ref[object] | None = None
        self._buffers: dict[Hashable, Tensor] = {}
        self._seen: dict[Hashable, tuple[Tensor, int]] = {}
        self._steps: dict[Hashable, _Step] = {}

    def lease(self, owner: object) -> bool:
        """Take it for a run; False where another run has it, or nothing can be captured."""
        with self._lock:
            other = self._owner() if self._owner is not None else None
            if self.refused or (other is not None and other is not owner):
                return False
            self._owner = weakref.ref(owner)
            self.slots.clear()
            return True

    def release(self, owner: object) -> None:
        """The end of a run."""
        with self._lock:
            if self._owner is not None and self._owner() is owner:
                self._owner = None

    def valid(self) -> bool:
        """Whether the weights still lie where the graphs read them."""
        return self._weights == addresses(self._model)

    def run(
        self,
        call: Hashable,
        reads: Sequence[int],
        stores: Sequence[int],
        given: Given,
        work: Callable[[Given], Sequence[Tensor]],
    ) -> list[Tensor]:
        """Replay a call, or capture it.

        Args:
            call: What is called.
            reads: The slots that it reads.
            stores: The slots that it stores to.
            given: All else that it reads, by name; the same names have the same shapes and dtypes at every call.
            work: Does it with what is given and the slots, stores, and gives the results.

        Returns:
            The results, in tensors of their own.

        Raises:
            CaptureError: It cannot be captured, or a replay gives something else.
        """
        with self._recorder.turn(), ordinary_tensors():
            self._load(given)
            key = (call, tuple(map(id, self.slots.held(reads))), tuple(stores))
            own = {name: self._buffers[name] for name in given}
            if not self._at_once and key not in self._met:
                self._met.add(key)
                return [value.clone() for value in work(own)]
            if key not in self._steps:
                self._steps[key] = self._capture(lambda: work(own), stores)
            else:
                self._steps[key].replay()
            for slot, kept in self._steps[key].stores.items():
                self.slots.hold(slot, kept)
            return [result.clone() for result in self._steps[key].results]

    def _load(self, given: Given) -> None:
        """Bring the buffers up to date; what is the last call's tensor, untouched, is there already."""
        targets, sources = [], []
        for name, value in given.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty_like(value, memory_format=torch.contiguous_format)
            seen, tracked = self._seen.get(name), not value.is_inference()
            if seen is None or not tracked or seen[0] is not value or seen[1] != value._version:
                targets.append(self._buffers[name])
                sources.append(value)
            # What has no version may be written to unseen.
            if tracked:
                self._seen[name] = (value, value._version)
            else:
                self._seen.pop(name, None)
        if targets:
            torch._foreach_copy_(targets, sources)

    def _capture(self, work: Callable[[], Sequence[Tensor]], stores: Sequence[int]) -> _Step:
        """Run the call as it is, capture it, and compare a replay with it."""
        # All places are made here: what a capture allocates does not last.
        found = self._recorder.warm_up(work)
        results = tuple(torch.empty_like(value, memory_format=torch.contiguous_format) for value in found)
        held = self.slots.held(stores)
        lasting = [*results, *(tensor for kept in held for tensor in _tensors(kept))]
        expected = [value.clone() for value in (*found, *lasting[len(results) :])]

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
        return _Step(replay, results, dict(zip(stores, held, strict=True)))


def _tensors(kept: Kept) -> list[Tensor]:
    return [tensor for one in kept for tensor in (one.tensors if isinstance(one, Narrow) else (one,))]


def _like(kept: Tensor | Narrow) -> Tensor | Narrow:
    """A place for a value."""
    if isinstance(kept, Narrow):
        scale = None if kept.scale is None else torch.empty_like(kept.scale)
        return Narrow(torch.empty_like(kept.data), scale, kept.dtype)
    return torch.empty_like(kept)
