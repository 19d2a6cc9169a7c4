"""Full-size models without weights, each made once, so that their traces are handed on between files too."""

from functools import cache

import torch

from stepgraph.compiler.entry.load_model import load_to_plan


@cache
def full_size(name: str) -> torch.nn.Module:
    """A published model in bfloat16 on the meta device."""
    return load_to_plan(f"{name}:random", torch.bfloat16)
