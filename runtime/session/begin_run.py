"""The beginning of a run: what changed since the compilation is followed, or refused before anything is computed."""

from typing import TYPE_CHECKING

from torch import nn

from stepgraph.errors import CompileError
from stepgraph.runtime.program.facts import Changed, Difference
from stepgraph.runtime.program.program import Program

if TYPE_CHECKING:
    from stepgraph.runtime.session.compiled import Compiled


def begin_run(executable: "Compiled", program: Program, model: nn.Module | None = None) -> None:
    """Let the program follow the model, or refuse the run.

    Args:
        executable: What runs.
        program: What of it.
        model: Whose values count, where the executable stands in for another model than its own, of equal weights.

    Raises:
        CompileError: What the model is made of, or a value that its forward read, is another one than when it was compiled;
            the message names it.
    """
    differences = program.watch.differences(executable.model if model is None else model)
    for found in differences:
        if found.kind is not Changed.WEIGHTS:
            _refuse(executable, found)
    # Another model's weights are other objects; that they are equal was seen when it was attached.
    if differences and model in (None, executable.model):
        _refuse(executable, differences[0])


def _refuse(executable: "Compiled", found: Difference) -> None:
    name = type(executable.model).__name__
    if found.kind is Changed.VALUE:
        raise CompileError(
            f"{name} was compiled with {found.path} = {found.old}, which its forward reads; now it is {found.new}. "
            f"Set it back, or detach, and compile again"
        )
    raise CompileError(
        f"{name} is made of other parts than when it was compiled, such as {found.path!r} (before {found.old}, now "
        f"{found.new}; a LoRA, a hook or another change of its modules?); detach, and compile again"
    )
