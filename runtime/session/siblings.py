"""One plan for one model whose adapters change: an executable for every set of them that the last runs had."""

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from stepgraph.adapters import settle
from stepgraph.packed_weights import forget_packed
from stepgraph.runtime.capture.captured import Captured
from stepgraph.runtime.program.bound_weights import BoundWeights
from stepgraph.runtime.program.facts import Difference
from stepgraph.runtime.session.follow_weights import follow_values, follow_weights
from stepgraph.runtime.session.put_on_model import can_move, moved, put_on_model, refuse_other_configuration, weights_on
from stepgraph.runtime.session.refuse_difference import refuse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stepgraph.runtime.session.compiled import Compiled

# How many are kept beside the one that was compiled first.
SIBLINGS = 4


class Siblings:
    """The executables of a plan and a model that differ in the adapters which these are compiled for.

    Attributes:
        kept: The first is the one that the others came of; then, the last used last.
        present: Whose the last run was.
    """

    def __init__(self, first: "Compiled") -> None:
        self.kept, self.present = [first], first
        self.lock = threading.RLock()

    def turn_to(self, executable: "Compiled", instead: "Compiled | None" = None) -> "Compiled":
        """Let an executable be the present one; in the place of another, if it is the same on other modules."""
        first, *others = [executable if one is instead else one for one in self.kept]
        if first is not executable:
            others = [*(one for one in others if one is not executable), executable][-SIBLINGS:]
        # What was packed since the other ran is of what weights held then.
        forget_packed(executable.weights.differing(self.present.weights))
        if executable is not self.present:
            # Captures hold the memory of a run.
            object.__setattr__(self.present, "captured", Captured(self.present.captured))
        self.kept, self.present = [first, *others], executable
        object.__setattr__(executable, "siblings", self)
        return executable


def suited(executable: "Compiled", inputs: "Mapping[str, Any] | None" = None, begin: int = 0) -> "Compiled":
    """The executable of a plan for its model's adapters as they are: the present one, one that is kept, or a new one.

    Only at the beginning of a run: one that is under way goes on with what it began with.

    Args:
        executable: Any of them.
        inputs: The forward's arguments that a new one is compiled for; else those of the first.
        begin: The plan's step with which the run begins.

    Raises:
        CompileError: Something else than adapters is another one than when the plan was compiled; or adapters are, and the
            executable was compiled with `respecialize=False`.
        MismatchError: The plan does not follow other adapters.
    """
    siblings, model = executable.siblings, executable.model
    with siblings.lock:
        present = siblings.present
        watch = present.known(inputs, begin).watch
        if not watch.follow(model) and present.weights.stands(model, watch.tree):
            return present
        settle(model)
        known = _turn_to_kept(siblings, model)
        if known is not None:
            return known
        changed = _follow_adapters(siblings.kept[0], model)
        new = _new(siblings.kept[0], model, changed)
        object.__setattr__(new, "siblings", siblings)
        forget_packed(new.weights.tensors)
        new.program(inputs, begin) if inputs is not None else new.default  # compiles it
        return siblings.turn_to(new)


def refuse_unsuited(executable: "Compiled") -> None:
    """See that a run could begin with a model as it is, without compiling for it.

    Raises:
        CompileError: See `suited`.
        MismatchError: See `suited`.
    """
    siblings, model = executable.siblings, executable.model
    with siblings.lock:
        settle(model)
        if _turn_to_kept(siblings, model) is None:
            _follow_adapters(siblings.kept[0], model)


def put_on(executable: "Compiled", model: nn.Module) -> "Compiled":
    """The plan on another model (`Compiled.on`), with the programs for its adapters; compiled where there are none yet.

    Raises:
        CompileError: It differs in more than tensors and adapters.
        MismatchError: The plan does not follow its weights or adapters.
    """
    settle(model)
    first, *others = executable.siblings.kept
    for one in (executable, first, *reversed(others)):
        if one.programs[0].facts.matches(model):
            return put_on_model(one, model)
    refuse_other_configuration(first, model)
    new = _new(first, model, _follow_adapters(first, model))
    follow_weights(new)
    new.default  # noqa: B018  # compiles it
    return new


def _turn_to_kept(siblings: Siblings, model: nn.Module) -> "Compiled | None":
    """Let the executable that is kept for the adapters of the model, on its modules, be the present one; None without one."""
    for one in reversed(siblings.kept):
        if one.programs[0].watch.follow(model):
            continue
        if one.weights.stands(model):
            return siblings.turn_to(one)
        weights = weights_on(one, model)
        if can_move(one, weights):
            return siblings.turn_to(moved(one, model, weights), instead=one)
    return None


def _follow_adapters(first: "Compiled", model: nn.Module) -> str:
    """See whether a plan can be compiled for the adapters of a model.

    Returns:
        What they have made other than when it was first compiled, as the beginning of a sentence; empty where that is
        nothing but which objects modules are.
    """
    facts = first.programs[0].facts
    others: Sequence[Difference] = list(facts.differences(model, base=True))
    differences = others or list(facts.differences(model))
    if not differences:
        # Modules that are other objects, in graphs that hold the former ones.
        return ""
    if others or not first.config.respecialize:
        refuse(first, differences, adapters=not others)
    one = differences[0]
    changed = f"{one.path} is {one.new}, and was {one.old} when the plan was compiled"
    follow_values(first, changed, adapters=True)
    return changed


def _new(first: "Compiled", model: nn.Module, changed: str) -> "Compiled":
    """An executable for a model as it is, of which nothing is compiled yet."""
    weights = BoundWeights(model)
    if weights.base == first.weights.base:
        count = len(weights.base)
        weights.compiled = (*first.weights.compiled[:count], *weights.compiled[count:])
    return replace(
        first, model=model, weights=weights, changed=changed, _default=None, _programs={}, _lock=threading.Lock(),
        captured=Captured(first.captured),
    )  # fmt: skip
