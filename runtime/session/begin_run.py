"""The beginning of a run: what changed since the compilation is followed, or refused before anything is computed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stepgraph.adapters import is_tuner
from stepgraph.errors import CompileError
from stepgraph.runtime.program.bound_weights import Look
from stepgraph.runtime.program.facts import hooks_of
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.session.follow_weights import follow_values, follow_weights
from stepgraph.runtime.session.refuse_difference import refuse
from stepgraph.runtime.session.siblings import suited

if TYPE_CHECKING:
    from stepgraph.runtime.session.compiled import Compiled


def begin_run(
    executable: "Compiled", inputs: Mapping[str, Any] | None = None, begin: int = 0, around: bool = False
) -> tuple["Compiled", Program, Look]:
    """Let an executable follow its model, what its forward reads and what its weights hold, or refuse the run.

    Args:
        executable: Any of its siblings.
        inputs: The forward's arguments; else those that the plan was compiled with.
        begin: The plan's step with which the run begins.
        around: Whether the model itself is called, as where the executable is attached: its hooks, and whatever replaced its
            forward meanwhile, run around the program.

    Returns:
        The executable for the adapters that the model has, its program for the inputs, and what was found of the weights.

    Raises:
        CompileError: See `suited`, `refuse_around`, `follow_facts` and `follow_weights`.
        MismatchError: The same.
    """
    looked_at = executable.siblings.present.known(inputs, begin)
    present = suited(executable, inputs, begin)
    program = present.default if inputs is None else present.find_program(inputs, begin)
    if program is not looked_at:
        refuse(present, program.watch.follow(present.model))
    if not around:
        refuse_around(present, program)
    _follow_strengths(present, program)
    return present, program, follow_weights(present, tree=program.watch.tree)


def follow_facts(executable: "Compiled", program: Program) -> None:
    """Let a program follow the strengths of its model, or refuse the run.

    Raises:
        CompileError: What the model is made of, or a value that its forward read, is another one than when it was compiled;
            the message names it.
        MismatchError: The plan does not follow another strength, which changes what the model computes as its weights do.
    """
    refuse(executable, program.watch.follow(executable.model))
    _follow_strengths(executable, program)


def refuse_changed_within(executable: "Compiled", programs: Sequence[Program], moves: int) -> None:
    """The end of a run: see that what the forward reads is still what it was when the run began.

    Strengths are followed at every call.

    Args:
        executable: Whose run.
        programs: That ran.
        moves: How often weights had been found to be others, or elsewhere, when the run began (`BoundWeights.moves`).

    Raises:
        CompileError: Something else changed, at a step that is not known: what was computed since is not the model's.
    """
    for program in programs:
        followed = program.watch.versions
        differences = program.watch.follow(executable.model)
        if differences:
            one = differences[0]
            raise _changed_within(executable, f"{one.path} was {one.old} when it began, and is {one.new}")
        if program.watch.versions != followed:
            raise _changed_within(executable, "a strength was written to past its version, so that no call noticed")
    displaced = executable.weights.displaced(programs[0].watch.tree if programs else None)
    if displaced or executable.weights.moves != moves:
        names = displaced or ("a weight",)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise _changed_within(executable, f"{names[0]}{more} became another tensor, or came to lie elsewhere")


def _changed_within(executable: "Compiled", what: str) -> CompileError:
    return CompileError(
        f"{type(executable.model).__name__} was changed within the run: {what}. Steps compute with what a run began with, so "
        f"its result is not this model's; run again, or change it between runs"
    )


def refuse_other_forward(executable: "Compiled", program: Program) -> None:
    """See that the model's own forward is the one that was traced.

    Raises:
        CompileError: It was replaced, which the program knows nothing of.
    """
    difference = program.watch.facts.other_forward(executable.model)
    if difference is not None:
        refuse(executable, [difference])


def refuse_around(executable: "Compiled", program: Program) -> None:
    """Refuse a run that is no call of the model where something else than the traced forward would run in one.

    Raises:
        CompileError: See `refuse_other_forward`; or the model itself has hooks.
    """
    refuse_other_forward(executable, program)
    hook = next(iter(hooks_of(executable.model)), None)
    if hook is not None:
        name = type(executable.model).__name__
        raise CompileError(
            f"{name} itself has the hook {hook!r}, which runs around the model's calls, and this is none of them; remove it, "
            f"or attach the executable and call the model"
        )


def _follow_strengths(executable: "Compiled", program: Program) -> None:
    if executable.changed:
        follow_values(executable, executable.changed, adapters=True)
    others = program.watch.others
    if others:
        adapters = all(is_tuner(type(executable.model.get_submodule(strength.module))) for strength, _ in others)
        follow_values(executable, others[0][1], adapters)
