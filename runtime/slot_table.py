"""The stored values of one branch of a running session: which are held, and where."""

import torch

from stepgraph.runtime.arena import Arena
from stepgraph.runtime.layout import Moves, Places


class SlotTable:
    """Values by slot. They lie in the session's arena; what is off-loaded lies in host memory between its uses.

    On CUDA, copies to and from host memory run on a stream of their own while a step computes: they begin when the step
    before has ended, and the next step waits for them.

    Args:
        arena: The session's.
        host: Host memory, pinned for CUDA.
        count: How many slots there are.
        spoil: Whether memory that is given up is filled with NaN.
    """

    def __init__(self, arena: Arena, host: Arena, count: int, spoil: bool = False) -> None:
        self.arena, self.host, self.spoil = arena, host, spoil
        self._held: list[Places | None] = [None] * count
        self._away: dict[int, Places] = {}
        self._copies = torch.cuda.Stream(arena.memory.device) if arena.memory.is_cuda and host.memory.nbytes else None

    def begin(self, moves: Moves) -> None:
        """Start the copies of a step, when those of the step before are done."""
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
                self.host.copy(target, self.arena, source)
            self._away[slot] = places
        for slot, places in moves.come:
            for source, target in zip(self._away.pop(slot), places, strict=True):
                self.arena.copy(target, self.host, source)
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
        for place in self._held[slot] or () if self.spoil else ():
            self.arena.spoil(place)
        self._held[slot] = None

    @property
    def bytes(self) -> int:
        """Bytes of the values held in the arena now."""
        return sum(place.nbytes for places in self._held if places is not None for place in places)
