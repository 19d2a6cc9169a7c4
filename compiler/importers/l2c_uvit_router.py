"""Learning-to-Cache's router checkpoints for U-ViT under a DPM-Solver (arXiv 2406.01733, horseee/learning-to-cache).

A mapping of N vectors of 2 x blocks logits, in the order in which sampling goes (entry 2l is block l's attention, 2l + 1 its
feed-forward). N is the number of model evaluations: the second-order single-step DPM-Solver evaluates at the beginning s of a
solver step and at a point s1 within it, N / 2 times. The pairs are shifted against the solver's steps: what the evaluation at
s1 of step i computes is stored, and the one at s of step i + 1 reuses it where sigmoid(logit) <= theta of router i + 1. So
routers 1..N / 2 - 1 are used, and router 0 and those from N / 2 on are left as they were initialised.

Evaluation 2i of a plan is the one at s of solver step i, and evaluation 2i + 1 the one at its s1: so they follow one another in
diffusers' DPMSolverSinglestepScheduler with `solver_order=2`, whose N inference steps are N evaluations. It places s1 at
the next point of its own grid of N timesteps, and ends with two first-order updates: neither changes which evaluation reads
from which. Conditional and unconditional calls share the plan and have stored values of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepgraph.compiler.interfaces.importer import (
    Importer,
    keys_in_order,
    refuse_other_kinds,
    router_letters,
    sites_of,
    skipped,
)
from stepgraph.errors import MismatchError
from stepgraph.plan import Site


def recognizes(data: Any) -> bool:
    """A mapping of nothing but vectors."""
    return (
        isinstance(data, Mapping)
        and bool(data)
        and all(isinstance(value, torch.Tensor) and value.ndim == 1 and value.is_floating_point() for value in data.values())
    )


def actions(data: Mapping[str, Any], sites: Sequence[Site], steps: int, *, theta: float = 0.9) -> Mapping[str, str]:
    """The routers' reuses by site, for a threshold `theta` in 0..1."""
    refuse_other_kinds("a Learning-to-Cache router", sites, {"attn", "ff"})
    if len(data) != steps or steps % 2:
        raise MismatchError(
            f"the checkpoint holds {len(data)} routers for {steps} model evaluations; expected an even number of evaluations "
            f"and one router each"
        )
    keys = keys_in_order(data)
    width = len(sites_of(sites, "attn")) + len(sites_of(sites, "ff"))
    reused = [torch.zeros(width, dtype=torch.bool)] * steps
    for pair in range(1, steps // 2):
        reused[2 * pair] = skipped(repr(keys[pair]), data[keys[pair]], width, theta)
    return router_letters(sites, reused)


L2C_UVIT_ROUTER = Importer(recognizes, actions, source="Learning-to-Cache routers (U-ViT), arXiv 2406.01733")
