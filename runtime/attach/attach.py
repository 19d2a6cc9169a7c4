"""Running an executable inside a diffusers pipeline."""

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from stepgraph.errors import CompileError, PlanError
from stepgraph.plan.measured import rests_on_measurement
from stepgraph.plan.refuse_other import refuse_other_schedule, refuse_other_structure
from stepgraph.runtime.attach.run_timesteps import RunTimesteps, needs_waiting, read_timestep
from stepgraph.runtime.program.tables import waits
from stepgraph.runtime.session.begin_run import begin_run
from stepgraph.runtime.session.compiled import Compiled
from stepgraph.runtime.session.session import Session
from stepgraph.wrapped_models import forward_signature, unwrapped

# By transformer; the attachment itself lives on it, as its forward.
_attached: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]]" = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Attachment:
    """Stands in for the forward of a pipeline's transformer.

    A run begins with the first call after the last run's end, or with a call at the plan's first timestep; whatever an
    aborted run left is dropped then.

    Attributes:
        executable: What runs: the one that was attached, put on the pipeline's own model where that is another.
        owner: The one that was attached.
    """

    executable: Compiled
    owner: Compiled
    pipe: Any
    signature: inspect.Signature
    replaced: Any = None
    compiled: Any = None
    session: Session = field(init=False)
    timesteps: RunTimesteps | None = None
    first_latents: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.session = self.executable.session()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Refused: the copy's forward would run the original's weights."""
        raise CompileError("an executable is attached to this model; detach it before copying the model")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's forward, answered by the executable."""
        inputs = dict(self.signature.bind(*args, **kwargs).arguments)
        for extra in [p.name for p in self.signature.parameters.values() if p.kind is p.VAR_KEYWORD]:
            inputs |= inputs.pop(extra, {})
        try:
            self._find_step(inputs)
        except BaseException:
            self.session.reset()
            raise
        result = self.session(**inputs)
        if self.session.finished and self.timesteps is not None:
            self.timesteps.finish()
        return result

    def _find_step(self, inputs: dict[str, Any]) -> None:
        """Make sure that the session's next step is the one the pipeline asks for.

        Raises:
            PlanError: The pipeline's scheduler or timestep is not the plan's; the message says both sides.
        """
        given, run, step = inputs.get("timestep"), self.timesteps, self.session.step
        begun = (step > 0 or self.session.branch > 0) and not self.session.finished
        asked = self._asked(given, going_on=begun)
        if asked is None:
            return
        if begun and run is not None and self.pipe.scheduler.timesteps is run.timesteps:
            at_start = run.near(given, asked, 0)
            if run.near(given, asked, step) and not (at_start and self._begins_again(inputs)):
                return
            if not at_start:
                self._refuse_order(run.expected(given, step), asked)
        self._begin(inputs, asked)

    def _refuse_order(self, expected: float, asked: float) -> None:
        branches, step = self.executable.plan.header.branches, self.session.begin + self.session.step
        calls = f"{len(branches)} calls ({', '.join(branches)})" if len(branches) > 1 else "one call"
        raise PlanError(
            f"step {step} of the plan is at timestep {expected:g}, but the pipeline asks for timestep {asked:g}; "
            f"the plan's timesteps must be visited in order, with {calls} of the transformer each"
        )

    def _begin(self, inputs: dict[str, Any], asked: float) -> None:
        """A new run, at whichever evaluation of the pipeline's schedule its first call asks for.

        Raises:
            PlanError: The schedule is not the plan's, or has no such evaluation.
        """
        plan, scheduler = self.executable.plan, self.pipe.scheduler
        given: Any = inputs.get("timestep")
        self.session = self.executable.session()
        refuse_other_schedule(plan.header, scheduler, "the pipeline's scheduler", follow=not rests_on_measurement(plan))
        run = RunTimesteps(scheduler.timesteps, plan.header.timestep)
        if not run.find(given, asked, getattr(scheduler, "begin_index", None)) or run.begin < plan.header.schedule.begin:
            raise PlanError(
                f"the plan begins at timestep {run.expected(given, plan.header.schedule.begin - run.begin):g}, but the "
                f"pipeline's first call asks for {asked:g}, which is no later step of it; run the schedule from there"
            )
        self.session = self.executable.session(begin=run.begin - plan.header.schedule.begin, timesteps=run.rest)
        self.timesteps = run
        if needs_waiting(given):
            # The copy of all timesteps is made here, not at a later step, which would wait for it.
            run.note_difference(given, 0)
        self.first_latents = inputs[next(iter(self.signature.parameters))]

    def _asked(self, given: Any, going_on: bool) -> float | None:
        """The timestep that a call asks for; None for the next one, to be compared on its device.

        At a run's beginning it is read in any case.
        """
        same_run = going_on and self.timesteps is not None and self.pipe.scheduler.timesteps is self.timesteps.timesteps
        if not needs_waiting(given) or not same_run or self.timesteps is None:
            return read_timestep(given)
        value = self.timesteps.value(given)
        if value is None:
            self.timesteps.note_difference(given, self.session.step)
        return value

    def _begins_again(self, inputs: dict[str, Any]) -> bool:
        """Whether the call for a later branch of step 0 is really the first call of a new run.

        A pipeline sets its scheduler's timesteps anew for every run, and the branches of a step see the same latents, which
        are not waited for.
        """
        if self.timesteps is None or self.pipe.scheduler.timesteps is not self.timesteps.timesteps:
            return True
        latents = inputs[next(iter(self.signature.parameters))]
        return self.session.step == 0 and not waits(latents.device) and not _equal(latents, self.first_latents)


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)


def attach(executable: Compiled, pipe: Any) -> None:
    """Replace the forward of `pipe.transformer` by the executable, on that transformer's own weights.

    Raises:
        CompileError: The pipeline has no transformer, or already has an executable attached; or the transformer is made of
            other parts, or has other values that its forward reads, than the model when it was compiled.
        PlanError: The transformer is another model, or has other weights, which the plan does not follow.
    """
    transformer = getattr(pipe, "transformer", None)
    model = unwrapped(transformer)
    if not isinstance(transformer, nn.Module):
        raise CompileError(f"{type(pipe).__name__} has no transformer to attach to")
    if transformer in _attached:
        raise CompileError("the pipeline's transformer already has an executable attached; detach that one first")
    refuse_other_structure(executable.plan.header, model)
    runs = executable.on(model)
    begin_run(runs, runs.default)
    attachment = Attachment(runs, executable, pipe, forward_signature(model))
    attachment.replaced = transformer.__dict__.get("forward")
    transformer.forward = attachment
    # What torch.compile made of the module would be called in place of its forward.
    attachment.compiled, transformer._compiled_call_impl = transformer._compiled_call_impl, None
    _attached[transformer] = weakref.ref(attachment)


def detach(executable: Compiled) -> None:
    """Undo every `attach` of an executable."""
    attachments = [(transformer, ref()) for transformer, ref in list(_attached.items())]
    mine = [(transformer, one) for transformer, one in attachments if one is None or one.owner is executable]
    for transformer, attachment in mine:
        forward = transformer.__dict__.get("forward")
        if attachment is not None and forward is not attachment:
            raise CompileError(
                f"the forward of {type(transformer).__name__} was replaced by {forward!r} after the executable was "
                f"attached; undo that first, then detach"
            )
    for transformer, attachment in mine:
        if attachment is not None:
            del transformer.__dict__["forward"]
            if attachment.replaced is not None:
                transformer.__dict__["forward"] = attachment.replaced
            transformer._compiled_call_impl = attachment.compiled
        del _attached[transformer]


def own_forward(model: nn.Module) -> Callable[..., Any] | None:
    """The forward that an attached model had before; None where nothing is attached."""
    attachment = model.__dict__.get("forward")
    if not isinstance(attachment, Attachment):
        return None
    replaced: Callable[..., Any] = attachment.replaced or MethodType(type(model).forward, model)
    return replaced
