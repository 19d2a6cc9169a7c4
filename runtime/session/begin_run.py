"""The beginning of a run: what changed since the compilation is followed, or refused before anything is computed."""

from typing import TYPE_CHECKING

from stepgraph.errors import CompileError
from stepgraph.runtime.program.bound_weights import Look
from stepgraph.runtime.program.facts import Changed, Difference
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.session.follow_weights import follow_values, follow_weights

if TYPE_CHECKING:
    from stepgraph.runtime.session.compiled import Compiled


def begin_run(executable: "Compiled", program: Program) -> Look:
    """Let a program follow its model, what its forward reads and what its weights hold, or refuse the run.

    Raises:
        CompileError: See `follow_facts` and `follow_weights`.
        MismatchError: See `follow_weights`.
    """
    follow_facts(executable, program)
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
