"""The stored values of one branch of a running session: which are held, and where."""

from dataclasses import dataclass

import torch

from stepgraph.runtime.memory.arena import Arena
from stepgraph.runtime.memory.layout import Layout, Moves, Places


@dataclass(frozen=True)
class SlotMemory:
    """A session's memory for a program, which all branches share.

    Attributes:
        arena: On the device.
        host: For what is off-loaded, pinned for CUDA.
        copies: The stream of copies between the two, on CUDA.
    """

    arena: Arena
    host: Arena
    copies: torch.cuda.Stream | None = None

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> "SlotMemory":
        """As much as a layout needs."""
        host = Arena.of(layout.host_bytes, torch.device("cpu"), pinned=device.type == "cuda")
        memory = cls(Arena.of(layout.nbytes, device), host)
        if device.type != "cuda" or not layout.host_bytes:
            return memory
        copies = torch.cuda.Stream(device)
        # A run that is given up may leave a copy under way.
        memory.arena.memory.record_stream(copies)
        return cls(memory.arena, host, copies)


class SlotTable:
    """Values by slot. They lie in the session's arena; what is off-loaded lies in host memory between its uses.

    On CUDA, copies to and from host memory run on a stream of their own while a step computes: they begin when the calls
    before have ended, and the next call, of whatever branch, waits for them.

    Args:
        memory: The session's.
        count: How many slots there are.
        spoil: Whether memory that is given up is filled with NaN.
    """

    def __init__(self, memory: SlotMemory, count: int, spoil: bool = False) -> None:
        self.arena, self._host, self._copies, self._spoil = memory.arena, memory.host, memory.copies, spoil
        self._held: list[Places | None] = [None] * count
        self._away: dict[int, Places] = {}

    def begin(self, moves: Moves) -> None:
        """Start the copies of a step, when those of the call before are done."""
        if self._copies is None:
            self._copy(moves)
            return
        current = torch.cuda.current_stream(self.arena.memory.device)
        current.wait_stream(self._copies)
        self._copies.wait_stream(current)
        with torch.cuda.stream(self._copies):
            self._copy(moves)

    def _copy(self, moves: Moves) -> None:
        for slot, places in moves.leave:
            for source, target in zip(self.places(slot), places, strict=True):
                self._host.copy(target, self.arena, source)
            self._away[slot] = places
        for slot, places in moves.come:
            for source, target in zip(self._away.pop(slot), places, strict=True):
                self.arena.copy(target, self._host, source)
            self._held[slot] = places

    def places(self, slot: int) -> Places:
        """Where the tensors of the value in a slot lie."""
        places = self._held[slot]
        if places is None:
            raise RuntimeError(f"slot {slot} is empty: the plan's liveness and the session have come apart")
        return places

    def read(self, slot: int) -> tuple[torch.Tensor, ...]:
        """The tensors of the value in a slot; not to be written to, nor kept beyond the step."""
        return tuple(self.arena.read(place) for place in self.places(slot))

    def hold(self, slot: int, places: Places) -> None:
        """Note that a value was written to its places."""
        self._held[slot] = places

    def free(self, slot: int) -> None:
        """Forget what a slot has in the arena."""
        if self._spoil:
            for place in self._held[slot] or ():
                self.arena.spoil(place)
        self._held[slot] = None

    @property
    def bytes(self) -> int:
        """Bytes of the values held in the arena now."""
        return sum(place.nbytes for places in self._held if places is not None for place in places)
