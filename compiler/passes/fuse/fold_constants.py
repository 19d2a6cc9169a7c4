"""Make constants of a tensor's shape independent of the tensor."""

import torch
from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.compiler.marking.graphs import storages_of

# What makes a tensor of one number like another -> the number, or which argument it is.
NUMBERS = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1}
ARGUMENTS = {"full_like": 1, "new_full": 2}


def fold_constants(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Replace tensors of one number that take no more than a shape from another tensor; returns how many.

    What depends on the timestep's shape alone would be a table of all steps otherwise, and what depends on the latents' would
    be filled in every step. Not where it is written to in place.

    Before, behind a reused value without a gate: `%ones = ones_like(%gate)`, bfloat16 [B, 1, C].
    After: `%ones = full([B, 1, C], 1, dtype=torch.bfloat16, device=...)`, which is hoisted as one value for the run.
    """
    count = 0
    for node in list(gm.graph.nodes):
        filling = _filling(node)
        if filling is None or storages_of(node) & ctx.written:
            continue
        value = node.meta["val"]
        node.op, node.target = "call_function", torch.full
        node.args, node.kwargs = (tuple(value.shape), filling), {"dtype": value.dtype, "device": value.device}
        count += 1
    return count


def _filling(node: fx.Node) -> int | float | bool | None:
    """What a tensor is filled with that reads another one's shape; None for anything else."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method") or name not in {*NUMBERS, *ARGUMENTS}:
        return None
    if name in NUMBERS:
        return NUMBERS[name]
    place = ARGUMENTS[name]
    filling = node.args[place] if len(node.args) > place else node.kwargs.get("fill_value")
    return filling if isinstance(filling, (int, float)) else None
