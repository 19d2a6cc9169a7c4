"""cache-dit's step masks (vipshop/cache-dit): T flags, 1 to compute a step and 0 to take it from the cache.

Either the list by itself, as `cache_dit.steps_mask` returns it, or an object with the keys `steps_computation_mask` and, where
given, `steps_computation_policy`, named as in cache-dit's DBCacheConfig. A mask without a policy is taken as static: every zero
is cached.

At a cached step DBCache adds the residual that its cached blocks made at the last computed one to the tokens; so does the
site `stack_residual`, which stands for it here. Which steps are computed, and from which step a cached one reads, is equal.
Approximated is where the residual begins: with F blocks in front (F1B0 runs one, B0 none behind) DBCache runs these at cached
steps too and adds the residual of the others, while `stack_residual` runs none and adds the residual of all. Its calibrators
(TaylorSeer and others), which extrapolate the residual, have no part in a mask.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stepgraph.compiler.interfaces.importer import Importer, check_table, is_flag, letters
from stepgraph.errors import FileFormatError, PlanError
from stepgraph.plan import Site

MASK, POLICY = "steps_computation_mask", "steps_computation_policy"


def recognizes(data: Any) -> bool:
    """A list of flags, or an object with one under cache-dit's name."""
    if isinstance(data, dict):
        return MASK in data
    return isinstance(data, list) and bool(data) and all(map(is_flag, data))


def actions(data: Any, sites: Sequence[Site], steps: int) -> Mapping[str, str]:
    """The mask's reuses of the stack's residual."""
    mask = data[MASK] if isinstance(data, dict) else data
    policy = data.get(POLICY, "static") if isinstance(data, dict) else "static"
    if policy != "static":
        raise PlanError(
            f"{POLICY} is {policy!r}, which decides at run time which of the mask's zeros are cached; expected 'static', where "
            f"all of them are"
        )
    unknown = sorted(set(data) - {MASK, POLICY}) if isinstance(data, dict) else []
    if unknown:
        raise FileFormatError(f"unknown key {unknown[0]!r}; a mask has {MASK} and {POLICY}")
    return {"stack_residual": letters([not flag for flag in check_table(MASK, mask, steps)])}


CACHE_DIT_MASK = Importer(recognizes, actions, source="cache-dit step mask (DBCache)")
