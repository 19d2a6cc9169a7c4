"""B x, the cached input of linear maps in rank space: p in float32."""

from functools import partial

import torch
from torch import Tensor

from stepgraph.triton_kernels.launch import Launch, Launches, layout_of, precision_setting
from stepgraph.triton_kernels.projection import prepare_project

LAUNCHES = Launches[Launch]()


def lowrank_input(x: Tensor, b: Tensor) -> Tensor:
    """See `stepgraph.ops.lowrank_input`."""
    out = torch.empty((*x.shape[:-1], b.shape[0]), dtype=torch.float32, device=x.device)
    if out.numel():
        layout = (layout_of(x, b), precision_setting(x))
        LAUNCHES.obtain(layout, partial(prepare_project, x, b, None, out))(x, None, None, None, b, None, out)
    return out
