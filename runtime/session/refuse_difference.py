"""The refusal of a model that is another one than when it was compiled."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepgraph.errors import CompileError
from stepgraph.runtime.program.facts import Changed, Difference

if TYPE_CHECKING:
    from stepgraph.runtime.session.compiled import Compiled


def refuse(executable: "Compiled", differences: Sequence[Difference], adapters: bool = False) -> None:
    """Refuse a run for the first of the differences between the model and what was compiled.

    Args:
        executable: What was to run.
        differences: What differs.
        adapters: Whether nothing but adapters does.

    Raises:
        CompileError: There is a difference; the message names it.
    """
    name = type(executable.model).__name__
    remedy = "detach, and compile again"
    if adapters:
        remedy = f"{remedy}; or compile with respecialize=True, which does so where adapters change"
    for difference in differences:
        if difference.kind is Changed.VALUE:
            raise CompileError(
                f"{name} was compiled with {difference.path} = {difference.old}, which its forward reads; now it is "
                f"{difference.new}. Set it back, or {remedy}"
            )
        raise CompileError(
            f"{name} is made of other parts than when it was compiled, such as {difference.path!r} (before {difference.old}, "
            f"now {difference.new}; a LoRA, a hook or another change of its modules?); {remedy}"
        )
