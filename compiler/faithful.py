"""Is a traced graph the whole truth? What a forward does besides computing its outputs from its inputs is looked for here."""

import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from stepgraph.compiler.tracer import NO_PAST, TraceError


def state_of(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module, to see afterwards whether the forward changed one."""
    state: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in ("_buffers", "_parameters", "_modules")}
        for name, value in {**own, **module._buffers, **module._parameters, **module._modules}.items():
            members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, set)) else ()
            plain = isinstance(value, (int, float, str, bool))
            state[path, name] = (value if plain else id(value), [id(member) for member in members])
    return state


def refuse_changed_state(model: nn.Module, before: Mapping[tuple[str, str], Any]) -> None:
    """A forward that writes to its module computes with a past that a graph would not have."""
    for (path, name), value in state_of(model).items():
        if value == before.get((path, name)):
            continue
        module = model.get_submodule(path)
        lines, start = inspect.getsourcelines(type(module).forward)
        hits = [start + i for i, line in enumerate(lines) if f"self.{name}" in line]
        where = f"{inspect.getsourcefile(type(module).forward)}:{hits[0] if hits else start}"
        raise TraceError(f"{where}: the forward of {path or type(module).__name__} changes its own {name!r}; {NO_PAST}")


def clear_memos(model: nn.Module) -> None:
    """Empty the functools caches around the model: what they hold from before would be a constant of the graph, and what they
    hold from the trace has no data.
    """
    for memo in _memos(model):
        memo.cache_clear()


def _memos(model: nn.Module) -> Iterator[Any]:
    """Cached methods of the model's classes, and cached functions of the files they are written in."""
    kinds = {type(module) for module in model.modules()}
    files = {kind.__module__ for kind in kinds if not kind.__module__.startswith("torch.")}
    owners = [vars(base) for kind in kinds for base in kind.__mro__] + [vars(sys.modules[name]) for name in files]
    for owner in owners:
        for value in list(owner.values()):
            function = getattr(value, "__func__", value)
            if inspect.isroutine(getattr(function, "cache_clear", None)):
                yield function


def refuse_other_operations(first: fx.Graph, second: fx.Graph) -> None:
    """Two traces of one forward do the same, unless it depends on something that is neither an input nor a weight."""
    for one, other in zip(first.nodes, second.nodes, strict=False):
        if _spelled(one) != _spelled(other):
            source = (other.stack_trace or "").strip().removeprefix('File "').replace('", line ', ":").replace("\n", " ")
            raise TraceError(
                f"{source or other.format_node()}: traced twice, the forward did {_spelled(one)} and then {_spelled(other)}; "
                f"it depends on something that is neither an input nor a weight, such as a counter, a clock or a random number"
            )
    if len(first.nodes) != len(second.nodes):
        raise TraceError(
            f"traced twice, the forward took {len(first.nodes)} and then {len(second.nodes)} operations; {NO_PAST}"
        )


def _spelled(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))
    return f"{target}{node.args}{dict(node.kwargs)}"
