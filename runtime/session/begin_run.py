"""The beginning of a run: what changed since the compilation is followed, or refused before anything is computed."""

from typing import TYPE_CHECKING

from stepgraph.errors import CompileError
from stepgraph.runtime.program.bound_weights import Look
from stepgraph.runtime.program.facts import Changed, Difference, hooks_of
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.session.follow_weights import follow_values, follow_weights

if TYPE_CHECKING:
    from stepgraph.runtime.session.compiled import Compiled


def begin_run(executable: "Compiled", program: Program, around: bool = False) -> Look:
    """Let a program follow its model, what its forward reads and what its weights hold, or refuse the run.

    Args:
        executable: Whose run.
        program: What is to run.
        around: Whether the model itself is called, as where the executable is attached: its hooks, and whatever replaced its
            forward meanwhile, run around the program.

    Raises:
        CompileError: See `refuse_around`, `follow_facts` and `follow_weights`.
        MismatchError: See `follow_weights`.
    """
    follow_facts(executable, program)
    if not around:
        refuse_around(executable, program)
    return follow_weights(executable)


def follow_facts(executable: "Compiled", program: Program) -> None:
    """Let a program follow the strengths of its model, or refuse the run.

    Raises:
        CompileError: What the model is made of, or a value that its forward read, is another one than when it was compiled;
            the message names it.
        MismatchError: The plan does not follow another strength, which changes what the model computes as its weights do.
    """
    for difference in program.watch.differences(executable.model):
        _refuse(executable, difference)
    if program.watch.others:
        follow_values(executable, program.watch.others[0])


def refuse_other_forward(executable: "Compiled", program: Program) -> None:
    """See that the model's own forward is the one that was traced.

    Raises:
        CompileError: It was replaced, which the program knows nothing of.
    """
    difference = program.watch.facts.other_forward(executable.model)
    if difference is not None:
        _refuse(executable, difference)


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


def _refuse(executable: "Compiled", difference: Difference) -> None:
    name = type(executable.model).__name__
    if difference.kind is Changed.VALUE:
        raise CompileError(
            f"{name} was compiled with {difference.path} = {difference.old}, which its forward reads; now it is "
            f"{difference.new}. Set it back, or detach, and compile again"
        )
    raise CompileError(
        f"{name} is made of other parts than when it was compiled, such as {difference.path!r} (before {difference.old}, now "
        f"{difference.new}; a LoRA, a hook or another change of its modules?); detach, and compile again"
    )
