"""What was captured for an executable."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any, Generic, TypeVar

import torch

from stepgraph.env import get_logger
from stepgraph.errors import CaptureError
from stepgraph.runtime.capture.cudagraph import RECORDERS, Recorder

T = TypeVar("T")
# How many captures of a kind an executable keeps: each holds the memory of a run.
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
    """What was captured for an executable, by its kind and what it was captured for; the oldest of a kind makes room."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
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
            make: Captures it, or raises a CaptureError; then it is not tried again.
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
            except CaptureError as error:
                get_logger("capture").log(INFO if at_once else WARNING, "not captured: %s", error)
                return self._keep(key, Attempt(refusal=str(error)))

    def captures(self) -> list[Any]:
        """What was captured, and is kept."""
        with self._lock:
            return [attempt.capture for attempt in self._attempts.values() if attempt.capture is not None]

    def _keep(self, key: tuple[Any, ...], attempt: Attempt[T]) -> Attempt[T]:
        self._attempts.pop(key, None)
        self._attempts[key] = attempt
        # What was only asked for so far, or refused, is no capture.
        same = [name for name, other in self._attempts.items() if name[0] == key[0] and other.kind == attempt.kind]
        for old in same[: -(LIMITS[key[0]] if attempt.kind == "capture" else MOST_NOTES)]:
            del self._attempts[old]
        return attempt
