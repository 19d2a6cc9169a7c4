"""One run of a pipeline through its sampling loop, call by call."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from stepgraph.env import get_logger
from stepgraph.errors import PlanError
from stepgraph.runtime.attach.call import Call, same_values
from stepgraph.runtime.attach.run_timesteps import RunTimesteps, needs_waiting, read_timestep
from stepgraph.runtime.attach.watch_scheduler import Beginning
from stepgraph.runtime.program.tables import waits
from stepgraph.runtime.session.compiled import Compiled
from stepgraph.runtime.session.session import Session


@dataclass(eq=False)
class Run:
    """Which step a run is at, and who answers its calls: the session, or the model itself.

    Between two steps lies a call of the scheduler's `step`. In a loop that never calls it, the timesteps alone say where one
    ends. A call that has no place in the plan is answered by the model itself, which reads and stores nothing: a further
    call within a step, and a step whose batch is another one. A step that the session has missed cannot be made up for, so
    the model answers the following ones too, until one before which nothing is stored.

    Attributes:
        executable: What is attached.
        beginning: The `set_timesteps` that it began with.
        timesteps: The scheduler's, of which the run's are the rest.
        known: Whether its calls' timesteps are entries of the scheduler's own tensor, which tells them from other runs'.
        thread: Whose it is.
        said: What has been logged about runs of this model.
        rivals: Numbers of other beginnings that its first call may have belonged to.
        aside: Runs that were given up for this one, and whose loops could go on unseen.
        step: The step of the run that is being evaluated; -1 before the first.
    """

    executable: Compiled
    beginning: Beginning
    timesteps: RunTimesteps
    known: bool
    thread: int
    said: set[str]
    rivals: frozenset[int] = frozenset()
    aside: list["Run"] = field(default_factory=list)
    session: Session = field(init=False)
    step: int = -1
    _signatures: list[tuple[Any, ...]] = field(default_factory=list)
    _conditioning: list[dict[str, torch.Tensor]] = field(default_factory=list)
    _latents: dict[str, torch.Tensor] = field(default_factory=dict)
    _late: torch.Tensor | None = None
    _alone: bool = False
    _traces: list["weakref.ref[torch.Tensor]"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._steps_before = self._steps_seen = self.beginning.steps
        self._join(0)

    def _join(self, step: int) -> None:
        """Let a session begin at a step of the run."""
        rest, self._joined = self.timesteps.rest, step
        self.steps = len(rest)
        begin = self.timesteps.begin - self.executable.plan.header.schedule.begin + step
        self.session = self.executable.session(begin=begin, timesteps=rest[step:], around=True)

    @property
    def _awaited(self) -> int:
        """The step of the run that the session expects."""
        return self._joined + self.session.step

    @property
    def at_last_step(self) -> bool:
        """Whether the last step has been reached."""
        return self.step == self.steps - 1

    @property
    def finished(self) -> bool:
        """Whether the last step has had its calls."""
        return self.at_last_step and (self._alone or self._stepped or self._awaited != self.step)

    @property
    def unseen(self) -> bool:
        """Whether the loop of a run that was given up could go on without a `step` that is seen, and is still there.

        A loop holds what it gave to the model last, or what it got.
        """
        return self._never_stepped and any(trace() is not None for trace in self._traces)

    def gave(self, call: Call) -> bool:
        """Whether the last call had the very latents of another one, which so begins again."""
        return any(trace() is call.inputs[call.latents] for trace in self._traces)

    def trace(self, call: Call, outcome: Any) -> None:
        """Remember, without holding them, the latents and the output of a call."""
        tensors = [value for value in (call.inputs[call.latents], outcome[0]) if isinstance(value, torch.Tensor)]
        self._traces = [weakref.ref(tensor) for tensor in tensors]

    def give_up(self) -> None:
        """Let go of everything."""
        self.session.reset()
        self._latents, self._conditioning = {}, []

    @property
    def _stepped(self) -> bool:
        return self.beginning.steps > self._steps_seen

    @property
    def _never_stepped(self) -> bool:
        return self.beginning.steps == self._steps_before

    def is_further(self, call: Call) -> bool:
        """Whether a call after the last one of the plan belongs to the last step; its timestep is read."""
        if self._stepped or not self.is_at(call, read_timestep(call.timestep), self.step):
            return False
        # A loop without the scheduler's step may begin again at once.
        return not self._never_stepped or bool(self._difference(call))

    def is_at(self, call: Call, asked: float | None, step: int) -> bool:
        """Whether a call asks for the timestep of a step; what is not known (None) is taken for it, and noted."""
        return 0 <= step < self.steps and (asked is None or self.timesteps.near(call.timestep, asked, step))

    def goes_on_with(self, call: Call) -> bool:
        """Whether a call whose timestep is no entry of the scheduler's can only be the next step's: it has stepped, and the
        timestep is that one's in another dtype. A loop gives entries at first and casts then, where its latents change theirs.
        """
        given = call.timestep
        cast = isinstance(given, torch.Tensor) and given.dtype != self.timesteps.timesteps.dtype
        return cast and self._stepped and self.is_at(call, read_timestep(given), self.step + 1)

    def fits(self, call: Call) -> bool:
        """Whether a call may be the next one of the run, by its timestep, which is read."""
        asked = read_timestep(call.timestep)
        return self.is_at(call, asked, self.step + 1) or self.is_at(call, asked, self.step)

    def take(self, call: Call) -> bool:
        """Note the next call, and say whether the session answers it, or else the model itself.

        Raises:
            PlanError: The call has no place in the run.
        """
        if self.beginning.broken:
            raise PlanError(self.beginning.refusal)
        asked = self._asked(call)
        if self._is_next(call, asked):
            return self._take_next(call, asked)
        if not self._stepped and self.step >= 0 and self.is_at(call, asked, self.step):
            return self._take_again(call, asked)
        following = min(self.step + 1, self.steps - 1)
        planned = self.timesteps.begin - self.executable.plan.header.schedule.begin + following
        expected = self.timesteps.expected(call.timestep, following)
        if self.step >= 0 and self.is_at(call, asked, 0):
            raise PlanError(
                f"a second run of the transformer begins, at timestep {_read(call, asked):g}, while one is under way in this "
                f"thread that has come to step {planned - 1} of the plan and whose next call is to be at {expected:g}: another "
                f"pipeline was called within it (in a callback?), or its own loop began again. Both runs are refused from here "
                f"on. Call one pipeline after the other, or each in a thread of its own, with a scheduler of its own, and "
                f"attach both; a loop begins again with its scheduler's set_timesteps"
            )
        raise PlanError(
            f"step {planned} of the plan is at timestep {expected:g}, but the pipeline asks for timestep "
            f"{_read(call, asked):g}; the plan's timesteps must be visited in order, with {self._calls()} of the "
            f"transformer each. A run begins with the scheduler's set_timesteps; a pipeline that runs in turns with this one "
            f"needs a scheduler of its own, and to be attached as well"
        )

    def finish(self) -> None:
        """The end of the run: what was compared on the device is read.

        Raises:
            PlanError: A call had another timestep than the plan's, or the calls of a step had different latents.
        """
        self.timesteps.finish()
        late, self._late = self._late, None
        if late is not None and bool(late):
            raise PlanError(
                f"{self._calls()} of the transformer make a step, but those of a step differed in more than their "
                f"conditioning, so that the run's result is wrong. (Found at the end: on an accelerator, reading waits for it)"
            )

    def _calls(self) -> str:
        branches = self.executable.plan.header.branches
        return f"{len(branches)} calls ({', '.join(branches)})" if len(branches) > 1 else "one call"

    # -- which step ------------------------------------------------------------------------------------------------------

    def _asked(self, call: Call) -> float | None:
        """The timestep that a call asks for; None where reading it would wait for a device."""
        if not needs_waiting(call.timestep) or self.step < 0:
            return read_timestep(call.timestep)
        return self.timesteps.value(call.timestep)

    def _is_next(self, call: Call, asked: float | None) -> bool:
        """Whether a call is the first one of the next step."""
        if not self.is_at(call, asked, self.step + 1):
            return False
        if self.step < 0 or self._stepped:
            return True
        if not self._never_stepped:
            return False
        outstanding = self._awaited == self.step
        return not self.is_at(call, asked, self.step) or not (outstanding or self._difference(call))

    def _difference(self, call: Call) -> str:
        """How a call differs from each of the run's; empty where it is as one of them."""
        differences = [call.difference(before) for before in self._signatures]
        return "" if "" in differences else differences[0]

    def _take_next(self, call: Call, asked: float | None) -> bool:
        if 0 <= self.step == self._awaited and self.session.branch:
            self._leave_to_model(f"step {self.step} has had {self.session.branch} of {self._calls()}")
        if self.step >= 0 and not self._stepped and not self.known:
            self.beginning.refusal = (
                f"the scheduler steps in the middle of a run that had come to step {self.step} without it: two loops share "
                f"this scheduler; give each its own, and begin anew with set_timesteps"
            )
        self.step += 1
        self._refuse_doubt()
        self._steps_seen, self._latents = self.beginning.steps, {call.latents: call.inputs[call.latents]}
        if asked is None or (self.step == 0 and needs_waiting(call.timestep)):
            # The copy of all timesteps is made at the first step, not at a later one, which would wait for it.
            self.timesteps.note_difference(call.timestep, self.step)
        if self._alone:
            return False
        if self._awaited < self.step:
            return self._rejoin(call)
        return self._take_branch(call)

    def _refuse_doubt(self) -> None:
        """Refuse a step that may be that of a run which was given up, once.

        Raises:
            PlanError: It may.
        """
        place = self.timesteps.begin + self.step
        there = [run for run in self.aside if run.timesteps.begin + run.step + 1 == place and run.unseen and self.step]
        # The scheduler was set anew after some, and steps for this one.
        doubted = [run for run in there if not (run.beginning.over and self._stepped)]
        for run in doubted:
            run._traces = []
        if doubted:
            raise PlanError(
                f"a call at step {self.step} may belong to this run, or to one that was given up there when this one began: "
                f"the pipelines compute their timesteps, and that one's scheduler is not seen to step. Attach every pipeline "
                f"that calls the transformer, and run again"
            )

    def _take_again(self, call: Call, asked: float | None) -> bool:
        """A call within a step: of its next branch, or a further one."""
        if self._alone:
            return False
        if self._awaited == self.step:
            return self._take_branch(call)
        difference = self._difference(call)
        if self._awaited < self.step:
            return False
        if difference:
            self._say(f"a further call within a step: {difference}")
            return False
        raise PlanError(
            f"a further call of the transformer at timestep {_read(call, asked):g}, before the scheduler's step, "
            f"with inputs like the run's: the plan has {self._calls()} a step. Make a plan with as many "
            f"(guidance='separate'; accelerate with a call= that is guided so), "
            f"begin a new run with the scheduler's set_timesteps, and let pipelines that run in turns have schedulers of their "
            "own"
        )

    # -- who answers -----------------------------------------------------------------------------------------------------

    def _take_branch(self, call: Call) -> bool:
        """A call that may be the one which the session expects."""
        branch, fresh = self.session.branch, len(self._signatures) <= self.session.branch
        if fresh:
            # The two halves of guidance may have prompts of different lengths.
            like = not self._signatures or call.differs_in_sizes_only(self._signatures[0])
            difference = "" if like else self._difference(call)
        else:
            difference = call.difference(self._signatures[branch])
        if difference:
            self._say(f"another call than those of the steps before: {difference}")
            return False
        other = not fresh and self._is_other_branch(call, branch)
        if isinstance(other, torch.Tensor) and waits(call.inputs[call.latents].device):
            self._note_late(other)
        elif other:
            self._leave_to_model(f"call {branch + 1} of step {self.step} has the conditioning of another of its calls")
            return False
        if branch:
            self._note_difference(same_values({call.latents: call.inputs[call.latents]}, self._latents))
        if fresh:
            self._signatures.append(call.signature)
            self._conditioning.append(call.conditioning)
        return True

    def _is_other_branch(self, call: Call, branch: int) -> torch.Tensor | bool:
        """Whether a call is not the branch that is next, but another: guidance in two calls is switched off, say.

        Known at once where the tensors lie in the same memory, else on their device (`same_values`).
        """
        if len(self._conditioning) == 1:
            return False
        awaited = same_values(call.conditioning, self._conditioning[branch])
        if awaited is True:
            return False
        other: torch.Tensor | bool = False
        for index, conditioning in enumerate(self._conditioning):
            if index != branch and other is not True:
                same = same_values(call.conditioning, conditioning)
                other = same if isinstance(same, bool) and (same or other is False) else other | same
        if isinstance(awaited, bool):
            return other
        return ~awaited if other is True else ~awaited & other

    def _note_difference(self, same: torch.Tensor | bool) -> None:
        """Latents of one step's calls are the same; compared on their device, and read at the end."""
        if same is True:
            return
        if isinstance(same, torch.Tensor) and waits(same.device):
            self._note_late(~same)
        elif not same:
            raise PlanError(
                f"a call at step {self.step} has other latents than the call before it, but {self._calls()} of the "
                f"transformer make a step and differ in their conditioning only; a run begins with the scheduler's "
                "set_timesteps"
            )

    def _note_late(self, differs: torch.Tensor) -> None:
        self._late = differs if self._late is None else self._late | differs

    def _rejoin(self, call: Call) -> bool:
        """Let a new session go on, which computes at first what it would read; False where there can be none."""
        single = len(self.executable.plan.header.branches) == 1
        if not single or not call.differs_in_batch_only(self._signatures[0]):
            return False
        try:
            self.executable.plan.tail(self.session.begin - self._joined + self.step)
        except PlanError:
            # A forecast reads what was not stored.
            return False
        self.session.reset()
        self._join(self.step)
        self._signatures, self._conditioning = [call.signature], [call.conditioning]
        return True

    def _leave_to_model(self, reason: str) -> None:
        """The model answers the rest of the run."""
        self._say(reason)
        self._alone = True
        self.session.reset()

    def _say(self, what: str) -> None:
        """Log, once, that the model itself answers calls."""
        if what not in self.said:
            self.said.add(what)
            get_logger("attach").warning(
                "%s; the model itself answers such calls, and the steps behind them that would read what was not stored", what
            )


def _read(call: Call, asked: float | None) -> float:
    return read_timestep(call.timestep) if asked is None else asked
