"""Is a traced graph the whole truth? Not where the forward keeps tensors outside its module for a later call."""

import functools
import gc
import weakref
from types import FunctionType, ModuleType
from typing import Any

from stepgraph.compiler.tracing.traced_tensor import TracedTensor
from stepgraph.compiler.tracing.tracer import NO_PAST, KeptStateError

# Not searched on: these refer to all the rest of the process.
ENDS = (type, ModuleType, FunctionType)


def forget_in_memos(references: list["weakref.ref[TracedTensor]"]) -> None:
    """Empty the functools caches that kept a traced tensor; they are filled anew by the next call."""
    left = {id(traced) for ref in references if (traced := ref()) is not None}
    if left:
        kind = functools._lru_cache_wrapper
        # Every memo refers to its class: torch and Python between them have hundreds, most of them empty.
        memos = [thing for thing in gc.get_referrers(kind) if type(thing) is kind and thing.cache_info().currsize]
        for memo in _holding(memos, left):
            memo.cache_clear()


def refuse_survivors(references: list["weakref.ref[TracedTensor]"]) -> None:
    """See that the forward left no traced tensors behind; they have no data to go on with.

    Raises:
        KeptStateError: The forward kept one elsewhere than in a functools cache: that is its own past.
    """
    forget_in_memos(references)
    left = next((traced for ref in references if (traced := ref()) is not None), None)
    if left is not None:
        raise KeptStateError(f"{left.node.format_node()}: the forward keeps this tensor outside its module; {NO_PAST}")


def _holding(things: list[Any], wanted: set[int]) -> list[Any]:
    """Those that lead to one of the objects: halves are searched on only where there is something to be found."""
    if not _lead_to(things, wanted):
        return []
    middle = len(things) // 2
    return _holding(things[:middle], wanted) + _holding(things[middle:], wanted) if middle else things


def _lead_to(things: list[Any], wanted: set[int], steps: int = 5) -> bool:
    """Whether one of the objects is referred to within a few steps; all of a step at once, since there may be very many."""
    seen, reached = set(map(id, things)), things
    for _ in range(steps):
        parts = {id(part): part for part in gc.get_referents(*reached)}
        if not wanted.isdisjoint(parts):
            return True
        reached = [part for at, part in parts.items() if at not in seen and not issubclass(type(part), ENDS)]
        seen.update(parts)
    return False
