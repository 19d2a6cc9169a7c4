"""Running an executable inside a diffusers pipeline."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stepgraph.errors import CompileError, PlanError
from stepgraph.plan.refuse_other import refuse_other_structure
from stepgraph.runtime.attach.forward_stand_in import ForwardStandIn
from stepgraph.runtime.attach.runs import Runs
from stepgraph.runtime.session.begin_run import refuse_other_forward
from stepgraph.runtime.session.compiled import Compiled
from stepgraph.runtime.session.siblings import refuse_unsuited
from stepgraph.wrapped_models import unwrapped

# By transformer; the attachment itself lives on it, as its forward.
_attached: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]]" = weakref.WeakKeyDictionary()


class Attachment(ForwardStandIn):
    """Stands in for the forward of a transformer that pipelines share.

    Attributes:
        executable: What answers: the one that was attached, put on the pipeline's own model where that is another.
        owner: The one that was attached.
        runs: Who calls, and where each of them is.
        compiled: What torch.compile had made of the module.
        session: Of the last call's run.
    """

    def __init__(self, executable: Compiled, owner: Compiled, transformer: nn.Module) -> None:
        super().__init__(transformer)
        self.executable, self.owner, self.compiled = executable, owner, transformer._compiled_call_impl
        self.runs = Runs(executable)
        self.session = executable.session(around=True)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: the copy's forward would run the original's weights."""
        raise CompileError("an executable is attached to this model; detach it before copying, pickling or saving it whole")

    @property
    def __code__(self) -> Any:
        """Refused: `torch.export` would read the source of what stands in for the model."""
        raise CompileError("an executable is attached to this model; detach it before exporting or tracing the model")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's forward: answered by the executable, or by the model itself where the plan has no such call."""
        if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
            raise CompileError("an executable is attached to this model; detach it before exporting or tracing the model")
        call = self.call_of(*args, **kwargs)
        call.refuse_without_values()
        run = self.runs.admit(call)
        try:
            answered = run.take(call)
        except PlanError as error:
            self.runs.give_up(run, str(error))
            raise
        try:
            if answered:
                self.session = run.session
                outcome = run.session(**call.inputs)
            else:
                outcome = self.own_forward()(*args, **kwargs)
            run.trace(call, outcome)
            if run.finished or (not answered and run.at_last_step):
                run.finish()
        except BaseException:
            self.runs.drop(run)
            raise
        return outcome


def attach(executable: Compiled, pipe: Any) -> None:
    """Replace the forward of `pipe.transformer` by the executable, on that transformer's own weights.

    The pipeline's scheduler is watched. Pipelines that share a transformer share what is attached to it: each is attached.

    Raises:
        CompileError: The pipeline has no transformer or no scheduler, or already has an executable attached; or the
            transformer is made of other parts, or has other values that its forward reads, than the model when it was
            compiled.
        PlanError: The transformer is another model, or has other weights, which the plan does not follow.
    """
    transformer = getattr(pipe, "transformer", None)
    model = unwrapped(transformer)
    if not isinstance(transformer, nn.Module):
        raise CompileError(f"{type(pipe).__name__} has no transformer to attach to")
    present = _attached[transformer]() if transformer in _attached else None
    if present is not None and (present.owner is not executable or present.runs.has_user(pipe)):
        raise CompileError("the pipeline's transformer already has an executable attached; detach that one first")
    if present is not None:
        present.runs.add_user(pipe)
        return
    refuse_other_structure(executable.plan.header, model)
    runs = executable.on(model)
    refuse_unsuited(runs)
    refuse_other_forward(runs, runs.siblings.kept[0].programs[0])
    attachment = Attachment(runs, executable, transformer)
    attachment.runs.add_user(pipe)
    transformer.forward = attachment
    # What torch.compile made of the module would be called in place of its forward.
    transformer._compiled_call_impl = None
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
        if attachment is not None:
            attachment.runs.refuse_covered()
    for transformer, attachment in mine:
        if attachment is not None:
            attachment.runs.remove_users()
            del transformer.__dict__["forward"]
            if attachment.replaced is not None:
                transformer.__dict__["forward"] = attachment.replaced
            transformer._compiled_call_impl = attachment.compiled
        del _attached[transformer]


def own_forward(model: nn.Module) -> Callable[..., Any] | None:
    """The forward that an attached model had before; None where nothing is attached."""
    attachment = model.__dict__.get("forward")
    return attachment.own_forward() if isinstance(attachment, Attachment) else None
