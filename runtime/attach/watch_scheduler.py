"""What is done to a pipeline's scheduler: when a run begins (`set_timesteps`), and that a step lies between two calls."""

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

from stepgraph.errors import CompileError, PlanError

_numbers = itertools.count()
NAMES = ("set_timesteps", "step")


class Beginning:
    """What a call of `set_timesteps` begins.

    Attributes:
        steps: How often the scheduler's `step` has been called since.
        over: Whether the scheduler was set anew in the same thread, so that a run begun here is given up.
        refusal: Why the scheduler must not step; empty where it may.
        broken: Whether it tried to.
        number: Later ones have higher ones.
    """

    def __init__(self) -> None:
        self.steps, self.over, self.refusal, self.broken = 0, False, "", False
        self.number = next(_numbers)


class Watch:
    """Counts what is done to one scheduler, apart by thread; `Watch.of` begins it, `release` ends it.

    The two methods are covered by instance attributes. Copies and pickles of the scheduler do not have them.

    Attributes:
        scheduler: It.
        beginnings: By thread, the last `set_timesteps`.
        latest: The last one of all threads.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.beginnings: dict[int, Beginning] = {}
        self.latest: Beginning | None = None
        self._users = 0
        self._covered: dict[str, Any] = {}
        self._state: Callable[[], Any] | None = getattr(scheduler, "__getstate__", None)

    @classmethod
    def of(cls, scheduler: Any) -> "Watch":
        """The watch of a scheduler, one for all who want it.

        Raises:
            CompileError: The scheduler has no `set_timesteps` or `step`, or takes no attributes.
        """
        lacking = [name for name in NAMES if not callable(getattr(scheduler, name, None))]
        if lacking or not hasattr(scheduler, "__dict__"):
            raise CompileError(
                f"the pipeline's scheduler is {scheduler!r:.200}, which has no {lacking[0] if lacking else '__dict__'}; "
                f"expected a diffusers scheduler, whose set_timesteps and step say which run and step a call belongs to"
            )
        present = vars(scheduler).get("step")
        watch = present.watch if isinstance(present, _Covered) else cls(scheduler)._begin()
        watch._users += 1
        return watch

    def _begin(self) -> "Watch":
        for name in NAMES:
            if name in vars(self.scheduler):
                self._covered[name] = vars(self.scheduler)[name]
            setattr(self.scheduler, name, _Covered(self, name, getattr(self.scheduler, name)))
        if "__getstate__" in vars(self.scheduler):
            self._covered["__getstate__"] = vars(self.scheduler)["__getstate__"]
        self.scheduler.__getstate__ = self._plain_state
        return self

    def _plain_state(self) -> Any:
        """What `copy` and `pickle` take of the scheduler: its state as if nobody watched."""
        state = vars(self.scheduler) if self._state is None else self._state()
        if not isinstance(state, dict):
            return state
        plain = {name: value for name, value in state.items() if name not in (*NAMES, "__getstate__")}
        return plain | self._covered

    def covered_by(self) -> str | None:
        """What somebody has put over a watched method, by name; None where nothing."""
        return next((name for name in NAMES if not isinstance(vars(self.scheduler).get(name), _Covered)), None)

    def release(self) -> None:
        """One user less; after the last one the scheduler is as it was."""
        self._users -= 1
        if self._users:
            return
        for beginning in self.beginnings.values():
            beginning.over = True
        attributes = vars(self.scheduler)
        for name in [name for name in NAMES if isinstance(attributes.get(name), _Covered)]:
            attributes.pop(name)
            attributes |= {name: self._covered[name]} if name in self._covered else {}
        del attributes["__getstate__"]
        attributes |= {"__getstate__": self._covered["__getstate__"]} if "__getstate__" in self._covered else {}

    def note_set(self) -> Beginning:
        """A run begins in this thread; what was begun here before is given up."""
        thread = threading.get_ident()
        before = self.beginnings.get(thread)
        if before is not None:
            before.over = True
        self.latest = self.beginnings[thread] = Beginning()
        return self.latest

    def here(self) -> Beginning | None:
        """The last beginning of this thread."""
        return self.beginnings.get(threading.get_ident())

    def holds(self, beginning: Beginning) -> bool:
        """Whether a run began with this scheduler."""
        return any(beginning is one for one in [*self.beginnings.values(), self.latest])

    def present(self) -> Beginning | None:
        """The last beginning of this thread; else of another, for loops that are prepared elsewhere."""
        return self.here() or self.latest


class _Covered:
    """A method of a scheduler, watched."""

    def __init__(self, watch: Watch, name: str, method: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)
        self.watch, self.name, self.method = watch, name, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.name == "set_timesteps":
            outcome = self.method(*args, **kwargs)
            self.watch.note_set()
            return outcome
        beginning = self.watch.present()
        if beginning is not None and beginning.refusal:
            beginning.broken = True
            raise PlanError(beginning.refusal)
        outcome = self.method(*args, **kwargs)
        if beginning is not None:
            beginning.steps += 1
        return outcome

    def __reduce__(self) -> tuple[Any, ...]:
        """The method itself, where a copy of the scheduler is made that does not ask for its state."""
        return getattr, (self.watch.scheduler, self.name)
