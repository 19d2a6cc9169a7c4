"""How far two computations of one thing may be apart: relative L2 distances, by purpose and by dtype of the values.

Rounding grows with how much is computed between the two, and with how differently it is: the same kernels replayed add up in
another order at most; an op's providers fuse differently; a whole run hands its rounding on from step to step. Each purpose has
one row here, whoever compares for it. An entry None is for every dtype that the row does not name; what does not depend on a
dtype is a plain number.
"""

import math
from collections.abc import Mapping

import torch

Tolerances = Mapping[torch.dtype | None, float]

# An op of one provider against its reference in float64, in tests: one rounding of the result, and those within.
OP: Tolerances = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# The same before an op is timed, at the sizes of real models, where sums are longer.
TIMED_OP: Tolerances = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

# A replay of captured work against the work itself: the kernels are the same, but may add up in another order. Other dtypes are
# those of eight bits: roundings of values that differ by rounding.
REPLAY: Tolerances = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3, None: 6e-2}

# A graph after a pass against the graph before it (STEPGRAPH_CHECK): the same values, computed in other groups.
PASS_CHECK: Tolerances = {torch.float64: 1e-5, torch.float32: 1e-5, None: 3e-2}

# One evaluation of a compiled model, with nothing reused, against the eager model.
FIRST_STEP: Tolerances = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# A whole sampling run against the same plan's in another runtime, before it is timed.
WHOLE_RUN: Tolerances = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# A whole run of an exported program against the executable's.
EXPORTED_RUN: Tolerances = {torch.float32: 1e-5, torch.bfloat16: 4e-2}

# Numbers of a scheduler, in float64 or float32 whatever the model's dtype:
# timesteps that count as the same, in the scheduler's unit;
TIMESTEPS = 1e-3
# a step of a run against the same step on its own, relative and absolute: a solver with a history is far outside;
LONE_STEP = (1e-5, 1e-6)
# a state against the one that an output was solved for, and a slope beside its offset that counts as none, both relative;
LANDING, NO_SLOPE = 1e-3, 1e-6
# and a linear step against the scheduler's own, relative to the terms that it adds up.
LINEAR_STEP = 1e-9


def tolerance(purpose: Tolerances, dtype: torch.dtype, depth: int = 1) -> float:
    """The most that values of a dtype may be apart.

    Args:
        purpose: One of the rows above.
        dtype: Of the values.
        depth: How many products are added up in float32, one after the other, for each value. Each addition rounds by at most
            2^-24 of the sum so far, which has grown to the square root of k after k products of random signs; such errors add
            up to 2^-24 sqrt(depth / 2) of the whole, which is more than `OP` has for float32 from 563 products on.
    """
    return max(purpose[dtype if dtype in purpose else None], 2**-24 * math.sqrt(depth / 2))
