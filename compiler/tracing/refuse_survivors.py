"""Is a traced graph the whole truth? Not where the forward keeps tensors outside its module for a later call."""

import functools
import gc
import weakref
from types import FunctionType, ModuleType
from typing import Any

from stepgraph.compiler.tracing.tracer import NO_PAST, TracedTensor
from stepgraph.errors import TraceError


def forget_in_memos(made: list["weakref.ref[TracedTensor]"]) -> None:
    """Empty the functools caches that kept a traced tensor; they are filled anew by the next call."""
    left = {id(traced) for ref in made if (traced := ref()) is not None}
    if left:
        gc.collect()
        searched: dict[int, int] = {}
        for memo in [thing for thing in gc.get_objects() if type(thing) is functools._lru_cache_wrapper]:
            if _holds(memo, left, searched):
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


def _holds(thing: Any, wanted: set[int], searched: dict[int, int], depth: int = 5) -> bool:
    """Whether something refers to one of the objects, within a few steps; `searched` has what does not, and within how many."""
    if id(thing) in wanted:
        return True
    if depth <= searched.get(id(thing), 0) or isinstance(thing, (type, ModuleType, FunctionType)):
        return False
    if any(_holds(part, wanted, searched, depth - 1) for part in gc.get_referents(thing)):
        return True
    searched[id(thing)] = depth
    return False
