"""Put an executable on another model of the same make, such as a copy of its own: nothing is traced or compiled."""

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from stepgraph.errors import CompileError
from stepgraph.fingerprint import config_of, hash_config
from stepgraph.packed_weights import forget_packed
from stepgraph.runtime.capture.captured import Captured
from stepgraph.runtime.program.bound_weights import BoundWeights
from stepgraph.runtime.program.rebind import can_rebind, rebound
from stepgraph.runtime.session.follow_weights import follow_weights

if TYPE_CHECKING:
    from stepgraph.runtime.session.compiled import Compiled


def put_on_model(executable: "Compiled", model: nn.Module) -> "Compiled":
    """The executable's plan and programs on another model (`Compiled.on`).

    Args:
        executable: Goes on as it is.
        model: The other model.
    """
    # Where its own model has other adapters now, what it holds is what it held when it last ran.
    if executable.weights.stands(executable.model):
        follow_weights(executable)
    _refuse_other_make(executable, model)
    weights = weights_on(executable, model)
    executable.weights.refuse_other(weights)
    forget_packed(weights.tensors)
    put = moved(executable, model, weights)
    follow_weights(put)
    return put


def weights_on(executable: "Compiled", model: nn.Module) -> BoundWeights:
    """The tensors that an executable's programs would read on another model."""
    weights = BoundWeights(model, executable.weights.compiled)
    weights.add(executable.weights.held)
    return weights


def can_move(executable: "Compiled", weights: BoundWeights) -> bool:
    """Whether an executable's programs can run with other tensors, those of the same model on other modules."""
    try:
        executable.weights.refuse_other(weights)
    except CompileError:
        return False
    return all(map(can_rebind, executable.programs))


def moved(executable: "Compiled", model: nn.Module, weights: BoundWeights) -> "Compiled":
    """An executable on other modules and tensors of the same names; nothing is traced or compiled."""
    modules = weights.modules
    news: dict[int, Any] = {id(module): modules[path] for path, module in executable.weights.modules.items()}
    news |= {id(then): now for then, now in zip(executable.weights.tensors, weights.tensors, strict=True)}
    programs = {id(program): rebound(program, news) for program in executable.programs}
    return replace(
        executable, model=model, weights=weights, _default=programs.get(id(executable._default)),
        _programs={key: programs[id(program)] for key, program in executable._programs.items()},
        _lock=threading.Lock(), captured=Captured(),
    )  # fmt: skip


def refuse_other_configuration(executable: "Compiled", model: nn.Module) -> None:
    """See that two models are of one class and configuration."""
    mine, name = executable.model, type(model).__name__
    if type(model) is not type(mine):
        raise CompileError(f"compiled for a {type(mine).__name__}; this model is a {name}: compile a plan for it")
    if hash_config(config_of(model)) != hash_config(config_of(mine)):
        raise CompileError(f"this {name} has another configuration than the one that was compiled; compile a plan for it")


def _refuse_other_make(executable: "Compiled", model: nn.Module) -> None:
    """See that two models differ in nothing but the tensors that they hold, and in strengths."""
    refuse_other_configuration(executable, model)
    name = type(model).__name__
    for program in executable.programs:
        for difference in program.facts.differences(model):
            raise CompileError(
                f"in this {name}, {difference.path!r} is {difference.new}, in the one that was compiled {difference.old}; "
                f"compile the plan for it"
            )
    if not all(map(can_rebind, executable.programs)):
        raise CompileError(f"compiled with regions=False, graphs hold one {name}'s weights; compile the plan for this one")
