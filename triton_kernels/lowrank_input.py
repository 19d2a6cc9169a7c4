"""B x, the cached input of linear maps in rank space: p in float32."""

import torch
from torch import Tensor

from stepgraph.triton_kernels.projection import prologue, run_project


def lowrank_input(x: Tensor, b: Tensor) -> Tensor:
    """See `stepgraph.ops.lowrank_input`."""
    out = torch.empty((*x.shape[:-1], b.shape[0]), dtype=torch.float32, device=x.device)
    return run_project(x, b, None, out, *prologue(x, None, None, 0.0, 1))
