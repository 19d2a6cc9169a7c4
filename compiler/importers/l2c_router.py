"""Learning-to-Cache's router checkpoints for DiT (arXiv 2406.01733, horseee/learning-to-cache).

`routers` holds one vector of 2 x blocks logits per timestep index in ascending order (entry 2l is block l's attention, 2l + 1
its feed-forward); sampling goes through the indices downwards. Odd indices are full steps; at even ones a module is computed
where sigmoid(logit) > theta, and otherwise reuses the value of the step before.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepgraph.compiler.importers.importer import Importer, letters, sites_of
from stepgraph.plan import PlanError, Site


def recognizes(data: Any) -> bool:
    """A checkpoint with routers."""
    return isinstance(data, dict) and "routers" in data


def actions(data: Mapping[str, Any], sites: Sequence[Site], steps: int, *, theta: float = 0.1) -> Mapping[str, str]:
    """The routers' reuses by site, for a threshold `theta` in 0..1."""
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 <= theta <= 1:
        raise PlanError(f"theta is {theta!r}; expected a probability in 0..1")
    routers = data["routers"]
    if not isinstance(routers, (Mapping, Sequence)):
        raise PlanError(f"routers is {type(routers).__name__}; expected one vector of logits per step")
    routers = list(routers.values()) if isinstance(routers, Mapping) else list(routers)
    attn, ff = sites_of(sites, "attn"), sites_of(sites, "ff")
    if len(routers) != steps:
        raise PlanError(f"routers holds {len(routers)} vectors; expected {steps}, one per step")
    reused = []
    for step in range(steps):
        index = steps - 1 - step
        logits = routers[index]
        if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (len(attn) + len(ff),):
            shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise PlanError(f"routers[{index}] is {shape}; expected [{len(attn) + len(ff)}], two logits per block")
        skipped = torch.sigmoid(logits.float()) <= theta
        reused.append(torch.zeros_like(skipped) if index % 2 else skipped)
    table = torch.stack(reused)
    return {
        site.name: letters(table[:, 2 * i + part].tolist()) for part, own in ((0, attn), (1, ff)) for i, site in enumerate(own)
    }


L2C_ROUTER = Importer(recognizes, actions, source="Learning-to-Cache router (DiT), arXiv 2406.01733")
