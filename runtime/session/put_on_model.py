"""Put an executable on another model of the same make, such as a copy of its own: nothing is traced or compiled."""

import threading
from collections.abc import Mapping
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


def put_on_model(executable: "Compiled", model: nn.Module, parts: Mapping[str, Any]) -> "Compiled":
    """The executable's plan and programs on another model (`Compiled.on`).

    Args:
        executable: Goes on as it is.
        model: The other model.
        parts: What it is made of.
    """
    follow_weights(executable)
    _refuse_other_make(executable, model, parts)
    weights = BoundWeights(model, executable.weights.compiled)
    executable.weights.refuse_other(weights)
    forget_packed(weights.tensors)
    news: dict[int, Any] = {
        id(module): parts[name] for name, module in executable.parts.items() if isinstance(module, nn.Module)
    }
    news |= {id(then): now for then, now in zip(executable.weights.tensors, weights.tensors, strict=True)}
    programs = {id(program): rebound(program, news) for program in executable.programs}
    moved = replace(
        executable, model=model, parts=parts, weights=weights, default=programs[id(executable.default)],
        _programs={key: programs[id(program)] for key, program in executable._programs.items()},
        _lock=threading.Lock(), captured=Captured(),
    )  # fmt: skip
    follow_weights(moved)
    return moved


def _refuse_other_make(executable: "Compiled", model: nn.Module, parts: Mapping[str, Any]) -> None:
    """See that two models differ in nothing but the tensors that they hold."""
    mine, name = executable.model, type(model).__name__
    if type(model) is not type(mine):
        raise CompileError(f"compiled for a {type(mine).__name__}; this model is a {name}: compile a plan for it")
    if hash_config(config_of(model)) != hash_config(config_of(mine)):
        raise CompileError(f"this {name} has another configuration than the one that was compiled; compile a plan for it")
    for part in {**executable.parts, **parts}:
        then, now = executable.parts.get(part), parts.get(part)
        if type(then) is not type(now):
            raise CompileError(
                f"in this {name}, {part!r} is {type(now).__name__}, in the one that was compiled {type(then).__name__}; "
                f"compile the plan for it"
            )
    if not all(map(can_rebind, executable.programs)):
        raise CompileError(f"compiled with regions=False, graphs hold one {name}'s weights; compile the plan for this one")
