"""Tune the kernels of graphs while they are compiled, so that no run has to."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from stepgraph.compiler.lowering.lift_region import tensor_at
from stepgraph.ops import TUNED
from stepgraph.tuning import tuning


def tune_kernels(graphs: Sequence[fx.GraphModule]) -> int:
    """Run every distinct call of operators that are tuned once, on zeros; returns how many these were.

    Args:
        graphs: Their nodes' meta says shapes, strides, dtypes and devices.
    """
    seen: set[Hashable] = set()
    with tuning(), torch.no_grad():
        for gm in graphs:
            for node in gm.graph.nodes:
                if node.op == "call_function" and node.target in TUNED:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), partial(_value, gm))
                    layout = (node.target, *map(_layout, pytree.tree_leaves((args, kwargs))))
                    if layout not in seen:
                        seen.add(layout)
                        node.target(*pytree.tree_map(_zeros, args), **pytree.tree_map(_zeros, kwargs))
    return len(seen)


def _value(gm: fx.GraphModule, node: fx.Node) -> Any:
    return tensor_at(gm, str(node.target)) if node.op == "get_attr" else node.meta["val"]


def _layout(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf


def _zeros(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device).zero_()
