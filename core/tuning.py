"""When kernels may be timed against each other: where something is compiled or warmed up, never within a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ALLOWED: ContextVar[bool] = ContextVar("tuning", default=False)


@contextmanager
def tuning() -> Iterator[None]:
    """A time in which a kernel that is called for the first time with arguments of its kind may try its configurations.

    Outside, it takes its best guess: trying takes seconds, waits for the device and allocates memory there.
    """
    before = _ALLOWED.set(True)
    try:
        yield
    finally:
        _ALLOWED.reset(before)


def may_tune() -> bool:
    """Whether this is such a time."""
    return _ALLOWED.get()
