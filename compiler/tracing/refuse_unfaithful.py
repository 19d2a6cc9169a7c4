"""Is a traced graph the whole truth? What a forward does besides computing its outputs from its inputs is looked for here."""

import functools
import gc
import inspect
import weakref
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn

from stepgraph.compiler.tracing.tracer import NO_PAST, TracedTensor
from stepgraph.errors import TraceError


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
        where = _line_of(type(module).forward, f"self.{name}")
        raise TraceError(f"{where}: the forward of {path or type(module).__name__} changes its own {name!r}; {NO_PAST}")


def _line_of(function: Any, text: str) -> str:
    """ "file:line" of the first line of a function that contains a text."""
    try:
        lines, start = inspect.getsourcelines(function)
    except OSError:
        return f"{function.__qualname__} (no source file)"
    hits = [start + i for i, line in enumerate(lines) if text in line]
    return f"{inspect.getsourcefile(function)}:{hits[0] if hits else start}"


def forget_in_memos(made: list["weakref.ref[TracedTensor]"]) -> None:
    """Empty the functools caches that kept a traced tensor; they are filled anew by the next call."""
    left = {id(traced) for ref in made if (traced := ref()) is not None}
    if left:
        gc.collect()
        for memo in [thing for thing in gc.get_objects() if type(thing) is functools._lru_cache_wrapper]:
            if _holds(memo, left):
                memo.cache_clear()


def refuse_survivors(made: list["weakref.ref[TracedTensor]"]) -> None:
    """Take the traced tensors that the forward left behind out of wherever it put them; they have no data to go on with.

    Raises:
        TraceError: The forward kept one elsewhere than in a functools cache: that is its own past.
    """
    forget_in_memos(made)
    for ref in made:
        traced = ref()
        if traced is None:
            continue
        for holder in gc.get_referrers(traced):
            if isinstance(holder, dict):
                for key in [key for key, value in holder.items() if value is traced]:
                    del holder[key]
        raise TraceError(f"{traced.node.format_node()}: the forward keeps this tensor outside its module; {NO_PAST}")


def _holds(thing: Any, wanted: set[int], depth: int = 5) -> bool:
    """Whether something refers to one of the objects, within a few steps."""
    if id(thing) in wanted:
        return True
    if depth == 0 or isinstance(thing, (type, ModuleType, FunctionType)):
        return False
    return any(_holds(part, wanted, depth - 1) for part in gc.get_referents(thing))


def refuse_other_operations(
    first: fx.Graph, second: fx.Graph, constants: Mapping[str, torch.Tensor], again: Mapping[str, torch.Tensor]
) -> None:
    """Two traces of one forward do the same on the same constants, unless it depends on something outside itself."""
    for name, value in constants.items():
        if name in again and not torch.equal(value, again[name]):
            raise TraceError(f"traced twice, the forward came with other values of a {list(value.shape)} constant; {NO_PAST}")
    for one, other in zip(first.nodes, second.nodes, strict=False):
        if _spelled(one) != _spelled(other):
            source = (other.stack_trace or "").strip().removeprefix('File "').replace('", line ', ":").replace("\n", " ")
            raise TraceError(
                f"{source or other.format_node()}: traced twice, the forward did {_spelled(one)} and then {_spelled(other)}; "
                f"it depends on something that is neither an input nor a weight, such as a counter or a clock"
            )
    if len(first.nodes) != len(second.nodes):
        raise TraceError(
            f"traced twice, the forward took {len(first.nodes)} and then {len(second.nodes)} operations; {NO_PAST}"
        )


def _spelled(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))
    return f"{target}{node.args}{dict(node.kwargs)}"
