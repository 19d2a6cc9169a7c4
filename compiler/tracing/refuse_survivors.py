"""Is a traced graph the whole truth? Not where the forward keeps tensors outside its module for a later call."""

import functools
import gc
import weakref
from types import FunctionType, ModuleType
from typing import Any

from stepgraph.compiler.tracing.traced_tensor import TracedTensor
from stepgraph.compiler.tracing.tracer import NO_PAST
from stepgraph.errors import TraceError


def forget_in_memos(made: list["weakref.ref[TracedTensor]"]) -> None:
    """Empty the functools caches that kept a traced tensor; they are filled anew by the next call."""
    left = {id(traced) for ref in made if (traced := ref()) is not None}
    if left:
        searched: dict[int, int] = {}
        for memo in [thing for thing in gc.get_objects() if type(thing) is functools._lru_cache_wrapper]:
            if _holds(memo, left, searched):
                memo.cache_clear()


def refuse_survivors(made: list["weakref.ref[TracedTensor]"]) -> None:
    """See that the forward left no traced tensors behind; they have no data to go on with.

    Raises:
        TraceError: The forward kept one elsewhere than in a functools cache: that is its own past.
    """
    forget_in_memos(made)
    left = next((traced for ref in made if (traced := ref()) is not None), None)
    if left is not None:
        raise TraceError(f"{left.node.format_node()}: the forward keeps this tensor outside its module; {NO_PAST}")


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
