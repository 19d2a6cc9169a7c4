"""Weights at the beginning of a run: what changed is followed, or refused before anything is computed."""

from typing import TYPE_CHECKING

from stepgraph.env import get_logger, read_env
from stepgraph.packed_weights import forget_packed, forget_unlike, packings
from stepgraph.plan.measured import refuse_other_values
from stepgraph.runtime.program.bound_weights import Look
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.program.rebind import rebind

if TYPE_CHECKING:
    from stepgraph.runtime.session.compiled import Compiled


def follow_weights(executable: "Compiled", everything: bool = False, tree: object = None) -> Look:
    """See that an executable's programs compute with its model as it is now.

    Weights that are other objects or lie elsewhere are bound anew; copies of weights that hold other values are dropped, and
    made again when they are next used.

    Args:
        executable: Whose model may have changed.
        everything: Read all bits of all weights, as STEPGRAPH_CHECK=1 does at every run.
        tree: Where the model's modules were compared just before, what stands for them (`FactsWatch.tree`).

    Returns:
        For `finish_run`, which looks at the rest on an accelerator.

    Raises:
        CompileError: A weight is gone, new, or of another dtype, device, shape or strides than compiled for.
        MismatchError: Weights hold other values than those that numbers of the plan were measured on, or, if the executable is
            strict, than those that its choice was.
    """
    weights, everything = executable.weights, everything or read_env().check
    with weights.lock:
        look, packed = weights.look(everything, tree), packings()
        if look.replaced:
            for program in executable.programs:
                rebind(program, look.replaced)
        _follow(executable, look)
        # Also where nothing differs from the last look: what was packed in between may be of values that are gone again.
        weights.changes += forget_unlike(weights.tensors, weights.packed, everything)
        weights.packed = packed
    return look


def watch_tensors(executable: "Compiled", program: Program) -> None:
    """Look at what a new program reads beside weights as at the weights, from now on."""
    tensors = executable.weights.new_among(program.tensors)
    if tensors:
        with executable.weights.lock:
            follow_weights(executable, everything=True)
            executable.weights.add(tensors)


def finish_run(executable: "Compiled", look: Look) -> Look:
    """The end of a run: what the device found of the weights in the meantime.

    Returns:
        What was found; where values changed, what was computed before of kept copies of them is wrong.

    Raises:
        MismatchError: See `follow_weights`; the run's result is not the plan's.
    """
    found = executable.weights.finish(look)
    _follow(executable, found)
    return found


def _follow(executable: "Compiled", look: Look) -> None:
    """Drop the copies that were made of values that changed, and see whether the plan follows the new ones."""
    weights = executable.weights
    if look.written:
        get_logger("weights").info("%d weights hold other values, such as %s", len(look.written), look.written[0])
    if look.written or look.marked:
        forget_packed(weights.named((*look.written, *look.marked)))
    others = weights.others
    if not others:
        return
    more = f" and {len(others) - 1} more weights" if len(others) > 1 else ""
    difference = f"{others[0]}{more} hold other values than when the plan was compiled"
    follow_values(executable, difference, weights.adapters.issuperset(others))


def follow_values(executable: "Compiled", difference: str, adapters: bool = False) -> None:
    """See whether the plan follows other values than those that it was compiled with; says so once, if it should be known.

    Args:
        executable: Whose plan.
        difference: What differs, as the beginning of a sentence.
        adapters: Whether it is one of adapters, for any of which a plan can be declared.

    Raises:
        MismatchError: Numbers of the plan were measured on the former values; or its choice was, and it is strict.
    """
    warn_of(executable, refuse_other_values(executable.plan, difference, executable.config.strict, adapters))


def warn_of(executable: "Compiled", warning: str) -> None:
    """Say once that a plan goes on with something else than it was measured with; nothing for no words."""
    if warning and not any(one.weights.warned for one in executable.siblings.kept):
        executable.weights.warned = True
        get_logger("weights").warning("%s", warning)
