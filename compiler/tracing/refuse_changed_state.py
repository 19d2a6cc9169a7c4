"""Is a traced graph the whole truth? Not where the forward writes to its module."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from stepgraph.compiler.tracing.tracer import NO_PAST, KeptStateError


def module_attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module, to see afterwards whether the forward changed one."""
    state: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        plain_attributes = {
            name: value for name, value in vars(module).items() if name not in ("_buffers", "_parameters", "_modules")
        }
        for name, value in {**plain_attributes, **module._buffers, **module._parameters, **module._modules}.items():
            members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, set)) else ()
            plain = isinstance(value, (int, float, str, bool))
            state[path, name] = (value if plain else id(value), [id(member) for member in members])
    return state


def refuse_changed_state(model: nn.Module, before: Mapping[tuple[str, str], Any]) -> None:
    """A forward that writes to its module computes with a past that a graph would not have."""
    for (path, name), value in module_attributes(model).items():
        if value == before.get((path, name)):
            continue
        module = model.get_submodule(path)
        where = _line_of(type(module).forward, f"self.{name}")
        raise KeptStateError(f"{where}: the forward of {path or type(module).__name__} changes its own {name!r}; {NO_PAST}")


def _line_of(function: Any, text: str) -> str:
    """ "file:line" of the first line of a function that contains a text."""
    try:
        lines, start = inspect.getsourcelines(function)
    except OSError:
        return f"{function.__qualname__} (no source file)"
    hits = [start + i for i, line in enumerate(lines) if text in line]
    return f"{inspect.getsourcefile(function)}:{hits[0] if hits else start}"
