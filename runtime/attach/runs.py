"""The runs of everybody who calls one attached transformer, apart by thread and scheduler."""

import threading
import weakref
from typing import Any

import torch

from stepgraph.errors import CompileError, MismatchError, PlanError
from stepgraph.plan.measured import rests_on_measurement
from stepgraph.plan.refuse_other import NEAR, refuse_other_schedule
from stepgraph.runtime.attach.call import Call
from stepgraph.runtime.attach.run import Run
from stepgraph.runtime.attach.run_timesteps import RunTimesteps, is_entry, read_timestep
from stepgraph.runtime.attach.watch_scheduler import Beginning, Watch
from stepgraph.runtime.session.compiled import Compiled

# So many runs of schedulers that nobody watches, whose ends cannot be seen, are kept in a thread.
UNWATCHED = 4


class Runs:
    """Finds the run of a call.

    A call whose timestep is an entry of a scheduler's own tensor belongs to that scheduler's run. Where the pipeline computes
    its timesteps, they do not say whose they are: then a thread has one such run at a time, that of the last `set_timesteps`,
    and a scheduler of the one before must not go on.
    """

    def __init__(self, executable: Compiled) -> None:
        self.executable = executable
        # Of every pipeline, itself and the watch of its scheduler.
        self.users: list[tuple[Any, Watch]] = []
        self._runs: list[Run] = []
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._aside: list[Run] = []
        self._ended: weakref.WeakSet[Beginning] = weakref.WeakSet()

    def add_user(self, pipe: Any) -> None:
        """Watch a pipeline's scheduler (`Watch.of`)."""
        self.users.append((pipe, Watch.of(getattr(pipe, "scheduler", None))))

    def has_user(self, pipe: Any) -> bool:
        """Whether a pipeline is attached."""
        return any(pipe is one for one, _ in self.users)

    def refuse_covered(self) -> None:
        """See whether `remove_users` can undo `add_user`.

        Raises:
            CompileError: A method of a scheduler was replaced since.
        """
        for _, watch in self.users:
            name = watch.covered_by()
            if name is not None:
                raise CompileError(
                    f"{name} of {type(watch.scheduler).__name__} was replaced after the executable was attached; undo that "
                    f"first, then detach"
                )

    def remove_users(self) -> None:
        """Leave the schedulers as they were."""
        while self.users:
            self.users.pop()[1].release()

    def notice_schedulers(self) -> None:
        """Watch the schedulers that pipelines have now, in place of those that they had."""
        for place, (pipe, watch) in enumerate(self.users):
            if pipe.scheduler is not watch.scheduler:
                with self._lock:
                    self.users[place] = (pipe, Watch.of(pipe.scheduler))
                    watch.release()

    def drop(self, run: Run) -> None:
        """Forget a run that failed."""
        run.give_up()
        with self._lock:
            self._runs = [one for one in self._runs if one is not run]

    def give_up(self, run: Run, reason: str) -> None:
        """Forget a run whose loop may go on: its scheduler must not step, and its calls are not taken for another's."""
        self.drop(run)
        if not run.known:
            run.beginning.refusal = reason
            self._lay_aside(run)

    def _lay_aside(self, run: Run) -> None:
        self._aside = [*[one for one in self._aside if one.unseen], run][-UNWATCHED:]

    def admit(self, call: Call) -> Run:
        """Let the run that a call belongs to begin with it, or go on.

        Raises:
            PlanError: It begins none, and belongs to none of those under way.
            MismatchError: The schedule is not the plan's.
        """
        self.notice_schedulers()
        thread = threading.get_ident()
        known = [run for run in self._runs if run.known and is_entry(call.timestep, run.timesteps.timesteps)]
        current = [run for run in known if not run.beginning.over]
        if current:
            return self._go_on(call, min(current, key=lambda run: run.thread != thread))
        for _, watch in self.users:
            if is_entry(call.timestep, watch.scheduler.timesteps):
                return self._begin(call, watch, watch.present(), watch.scheduler.timesteps, known=True)
        if known:
            self.drop(known[0])
            raise PlanError(
                "the call belongs to a run that was given up when its scheduler's set_timesteps was called again; pipelines "
                "that run in turns need schedulers of their own"
            )
        schedule = self._schedule_of(call.timestep)
        if schedule is not None:
            return self._begin(call, None, None, schedule, known=True)
        return self._admit_by_value(call, [run for run in self._runs if run.thread == thread])

    def _go_on(self, call: Call, run: Run) -> Run:
        """The next call of a run whose timesteps say that it is its; a run that is over begins again."""
        if not run.finished or run.is_further(call):
            return run
        watch = next((watch for _, watch in self.users if watch.holds(run.beginning)), None)
        return self._begin(call, watch, run.beginning, run.timesteps.timesteps, known=True)

    def _admit_by_value(self, call: Call, here: list[Run]) -> Run:
        """The run of a call whose timestep is computed, or a number."""
        current = next((run for run in here if not run.known and not run.beginning.over), None)
        if current is not None and current.finished and not current.is_further(call):
            current = None
        taken = {*self._ended, *(run.beginning for run in self._runs)}
        begun = [(watch.here(), watch) for _, watch in self.users]
        pending = [(one, watch) for one, watch in begun if one is not None and one not in taken and not one.refusal]
        last = max(pending, key=lambda one: one[0].number, default=None)
        newer = last is not None and (current is None or last[0].number > current.beginning.number)
        if last is not None and (newer or (current is not None and not current.fits(call))):
            beginning, watch = last
            timesteps = self._place(call, watch.scheduler.timesteps, watch)
            if timesteps is not None or current is None:
                self._set_aside(current, beginning)
                run = self._begin(call, watch, beginning, watch.scheduler.timesteps, known=False)
                run.aside = [one for one in self._aside if one.thread == run.thread and not one.gave(call)]
                run.rivals = frozenset(other.number for other, _ in pending if other is not beginning)
                return run
        if current is not None:
            return current
        under_way = [run for run in here if not run.finished and not run.beginning.over]
        for run in under_way:
            if run.step >= 0 and run.is_further(call):
                return run
        if len(self.users) == 1 and len(under_way) == 1 and under_way[0].goes_on_with(call):
            under_way[0].known = False
            return under_way[0]
        if under_way:
            raise PlanError(
                f"a call at timestep {read_timestep(call.timestep):g}, which is no entry of the timesteps that the run under "
                f"way in this thread (at step {under_way[0].step}) takes its own from: another pipeline calls the same "
                f"transformer. Attach that one as well, or let the first run end, or begin it anew with its scheduler's "
                "set_timesteps"
            )
        return self._begin_anywhere(call)

    def _begin_anywhere(self, call: Call) -> Run:
        """A run of a loop that has not called `set_timesteps` in this thread, or not for this run."""
        watch = self._watch_of_plan()
        beginning = watch.present()
        # Whose the last run was is known; whose this one is, is not.
        taken = {*self._ended, *(run.beginning for run in self._runs)}
        unseen = Beginning() if beginning is not None and (beginning in taken or beginning.refusal) else beginning
        if unseen is not beginning:
            self._refuse_rest(call, watch)
        return self._begin(call, watch, unseen, watch.scheduler.timesteps, known=False)

    def _refuse_rest(self, call: Call, watch: Watch) -> None:
        """Refuse a call in the middle of a schedule that has not been set for it.

        Raises:
            PlanError: It is none of the plan's first step; where it fits a run that was given up, for the reason of that.
        """
        placed, header = self._place(call, watch.scheduler.timesteps, watch), self.executable.plan.header
        if placed is None or placed.begin > header.schedule.begin:
            thread = threading.get_ident()
            for given_up in reversed(self._aside):
                if given_up.thread == thread and given_up.beginning.refusal and given_up.fits(call):
                    raise PlanError(given_up.beginning.refusal)
            run = placed or RunTimesteps(watch.scheduler.timesteps, header.timestep)
            raise PlanError(
                f"the plan begins at timestep {run.expected(call.timestep, header.schedule.begin - run.begin):g}, but the "
                f"pipeline's first call asks for {read_timestep(call.timestep):g}; a run begins with the scheduler's "
                f"set_timesteps"
            )

    def _watch_of_plan(self) -> Watch:
        """The first scheduler that is set to the plan's timesteps.

        Raises:
            MismatchError: None is.
        """
        refused: MismatchError | None = None
        for _, watch in self.users:
            try:
                self._refuse_schedule(watch)
            except MismatchError as error:
                refused = refused or error
            else:
                return watch
        assert refused is not None
        raise refused

    def _place(self, call: Call, schedule: torch.Tensor, watch: Watch | None) -> RunTimesteps | None:
        """The timesteps of a run that begins with a call; None where the schedule has no such evaluation."""
        header, asked = self.executable.plan.header, read_timestep(call.timestep)
        timesteps = RunTimesteps(schedule, header.timestep)
        index = getattr(watch.scheduler, "begin_index", None) if watch is not None else None
        place = timesteps.find(call.timestep, asked, index)
        if place is None or place < header.schedule.begin:
            return None
        timesteps.begin = place
        return timesteps

    def _set_aside(self, run: Run | None, beginning: Beginning) -> None:
        """Give up a run whose timesteps do not tell it from one that begins: if its scheduler goes on, they run in turns.

        Raises:
            PlanError: They do already.
        """
        if run is None:
            return
        first, second = self._name_of(run.beginning), self._name_of(beginning)
        reason = (
            f"two runs of the transformer are under way in this thread: that of {first} had had its call at step {run.step} of "
            f"{run.steps} when that of {second} began (within a callback?). Both compute their timesteps, so that nothing "
            f"tells their calls apart, and the first was given up: its result would be wrong. Call one pipeline after the "
            f"other, or each in a thread of its own, and call {first} anew"
        )
        self.give_up(run, reason)
        if beginning.number in run.rivals:
            # The first call may have been either's.
            beginning.refusal = reason
            raise PlanError(reason)

    def _name_of(self, beginning: Beginning) -> str:
        """The pipeline that a run belongs to, in words."""
        for place, (pipe, watch) in enumerate(self.users):
            if watch.holds(beginning):
                return f"pipeline {place + 1} of {len(self.users)} attached ({type(pipe).__name__})"
        return "a pipeline that is not attached"

    def _schedule_of(self, timestep: Any) -> torch.Tensor | None:
        """The tensor of a scheduler that nobody watches, if a timestep is an entry of one which holds the plan's."""
        base = timestep._base if isinstance(timestep, torch.Tensor) else None
        if base is None or base.dim() != 1 or not is_entry(timestep, base):
            return None
        values = base.tolist()
        for schedule in [watch.scheduler.timesteps.tolist() for _, watch in self.users]:
            if len(values) == len(schedule) and all(abs(one - other) <= NEAR for one, other in zip(values, schedule)):
                return base
        return None

    def _refuse_schedule(self, watch: Watch) -> None:
        plan = self.executable.plan
        follow = not rests_on_measurement(plan)
        refuse_other_schedule(plan.header, watch.scheduler, "the pipeline's scheduler", follow=follow)

    def _begin(self, call: Call, watch: Watch | None, beginning: Beginning | None, timesteps: torch.Tensor, known: bool) -> Run:
        """A run that begins with this call."""
        if watch is None:
            self._watch_of_plan()
        else:
            self._refuse_schedule(watch)
        placed = self._place(call, timesteps, watch)
        if placed is None:
            header = self.executable.plan.header
            whole = RunTimesteps(timesteps, header.timestep)
            raise PlanError(
                f"the plan begins at timestep {whole.expected(call.timestep, header.schedule.begin):g}, but the pipeline's "
                f"first call asks for {read_timestep(call.timestep):g}, which is no later step of it; run the schedule "
                f"from there"
            )
        # Known to `threading` from now on, also where another library made the thread.
        thread = threading.current_thread().ident or 0
        self._forget(beginning, thread, unwatched=watch is None)
        if beginning is None:
            # A scheduler that was set before it was watched counts its steps from now on.
            beginning = watch.note_set() if watch is not None else Beginning()
        run = Run(self.executable, beginning, placed, known, thread, self._said)
        with self._lock:
            self._runs.append(run)
        return run

    def _forget(self, beginning: Beginning | None, thread: int, unwatched: bool) -> None:
        """Drop what is over: runs of schedulers that were set anew, runs that ended, those of threads that are no more."""
        alive = {one.ident for one in threading.enumerate()}
        for run in list(self._runs):
            ended = run.finished and run.thread == thread
            if run.beginning.over or run.beginning is beginning or ended or run.thread not in alive:
                self.drop(run)
                if run.finished:
                    self._ended.add(run.beginning)
                elif not run.known:
                    self._lay_aside(run)
        if unwatched:
            mine = [run for run in self._runs if run.thread == thread]
            others = [run for run in mine if not any(watch.holds(run.beginning) for _, watch in self.users)]
            for run in others[: max(0, len(others) - UNWATCHED + 1)]:
                self.drop(run)
