"""What was captured for an executable."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from logging import WARNING
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch

from stepgraph.env import get_logger
from stepgraph.errors import CaptureError
from stepgraph.runtime.capture.cudagraph import RECORDERS, Recorder
from stepgraph.runtime.memory.slot_table import SlotMemory


class Capture(Protocol):
    """What is kept."""

    @property
    def programs(self) -> tuple[object, ...]:
        """What it runs; it goes with any of them."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds for itself, beside the scratch of the graphs, which all of a recorder's share."""


T = TypeVar("T", bound=Capture)
# How many captures of a kind an executable keeps: runs, and programs whose calls are.
LIMITS = {"run": 4, "steps": 8}
# How many keys are remembered that were only asked for, or refused.
MOST_NOTES = 64


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """What came of asking for a capture; with neither it was asked for the first time, and is to be captured the next time.

    Attributes:
        capture: What was captured.
        refusal: Why nothing can be; it is not tried again.
    """

    capture: T | None = None
    refusal: str = ""

    @property
    def kind(self) -> str:
        """Which of the three it is."""
        if self.refusal:
            return "refusal"
        return "capture" if self.capture is not None else "asked"


class Captured:
    """What was captured for an executable, by its kind and what it was captured for; the oldest of a kind makes room.

    Attributes:
        run_memory: By program, where whole runs have their stored values. Nothing lasts in it from one run to the next, and
            they take turns: all runs of a program share it.
    """

    def __init__(self, before: "Captured | None" = None) -> None:
        """Nothing yet; what was said of another, whose place it takes, is not said again."""
        self._lock = threading.RLock()
        self.run_memory: WeakValueDictionary[int, SlotMemory] = WeakValueDictionary()
        self._said: set[str] = set() if before is None else before._said
        self._recorders: dict[torch.device, Recorder] = {}
        self._attempts: dict[tuple[Any, ...], Attempt[Any]] = {}

    def recorder(self, device: torch.device) -> Recorder:
        """The recorder of a device."""
        with self._lock:
            if device not in self._recorders:
                self._recorders[device] = RECORDERS[device.type](device)
            return self._recorders[device]

    def obtain(self, key: tuple[Any, ...], make: Callable[[], T], valid: Callable[[T], bool], at_once: bool) -> Attempt[T]:
        """What was captured for a key; it is captured where it is not there yet.

        Args:
            key: Its kind, and what it is captured for.
            make: Captures it, or raises a CaptureError, or has no memory; then it is not tried again.
            valid: Whether it can still be replayed; else it is captured anew.
            at_once: Capture when it is asked for the first time; else when it is asked for again, so that what runs once
                only does not pay for it.
        """
        with self._lock:
            known: Attempt[T] | None = self._attempts.get(key)
            if known is None and not at_once:
                return self._keep(key, Attempt())
            if known is not None and (known.refusal or (known.capture is not None and valid(known.capture))):
                return known
            # What cannot be replayed any more gives its memory back first.
            self._keep(key, Attempt())
            del known
            try:
                return self._keep(key, Attempt(make()))
            except (CaptureError, torch.OutOfMemoryError) as error:
                return self._keep(key, Attempt(refusal=str(error).splitlines()[0]))

    def decline(self, reason: str, instead: str, level: int = WARNING) -> None:
        """Say that something is not a replay, once for each reason.

        Args:
            reason: Why.
            instead: What is done in its place.
            level: Of the logging module; lower where the caller asked for what stands against it.
        """
        with self._lock:
            if reason in self._said:
                return
            self._said.add(reason)
        get_logger("capture").log(level, "not captured: %s; %s", reason, instead)

    def forget(self, program: object) -> None:
        """Drop what was captured of a program that is kept no longer."""
        with self._lock:
            for key, attempt in list(self._attempts.items()):
                capture = attempt.capture
                if key == ("steps", id(program)) or (capture is not None and any(program is one for one in capture.programs)):
                    del self._attempts[key]

    def captures(self) -> list[Capture]:
        """What was captured, and is kept."""
        with self._lock:
            return [attempt.capture for attempt in self._attempts.values() if attempt.capture is not None]

    @property
    def nbytes(self) -> int:
        """Bytes that all of it holds, beside the scratch of the graphs."""
        with self._lock:
            return sum(one.nbytes for one in self.captures()) + sum(one.arena.memory.nbytes for one in self.run_memory.values())

    def _keep(self, key: tuple[Any, ...], attempt: Attempt[T]) -> Attempt[T]:
        self._attempts.pop(key, None)
        self._attempts[key] = attempt
        # What was only asked for so far, or refused, is no capture.
        same = [name for name, other in self._attempts.items() if name[0] == key[0] and other.kind == attempt.kind]
        for old in same[: -(LIMITS[key[0]] if attempt.kind == "capture" else MOST_NOTES)]:
            del self._attempts[old]
        return attempt
