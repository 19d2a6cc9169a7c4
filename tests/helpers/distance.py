"""How far values are from what they should be, and how far rounding alone may take them: by the table of tolerances."""

import torch

from stepgraph.tolerances import EXPORTED_RUN, REPLAY, WHOLE_RUN, tolerance

# Of float32: two computations of one run, or of a step of it; those of an exported program; and a replay of captured work.
SAME_RUN = tolerance(WHOLE_RUN, torch.float32)
SAME_EXPORTED_RUN = tolerance(EXPORTED_RUN, torch.float32)
SAME_REPLAY = tolerance(REPLAY, torch.float32)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 of all values together, in float64."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
