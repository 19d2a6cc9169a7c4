"""Learning-to-Cache's router checkpoints for DiT (arXiv 2406.01733, horseee/learning-to-cache).

`routers` holds one vector of 2 x blocks logits per timestep index in ascending order (entry 2l is block l's attention, 2l + 1
its feed-forward); sampling goes through the indices downwards. Odd indices are full steps; at even ones a module is computed
where sigmoid(logit) > theta, and otherwise reuses the value of the step before.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepgraph.compiler.interfaces.importer import (
    Importer,
    keys_in_order,
    refuse_other_kinds,
    refuse_other_length,
    router_letters,
    sites_of,
    skipped,
)
from stepgraph.errors import FileFormatError
from stepgraph.plan import Site


def recognizes(data: Any) -> bool:
    """A checkpoint with routers."""
    return isinstance(data, dict) and "routers" in data


def actions(data: Mapping[str, Any], sites: Sequence[Site], steps: int, *, theta: float = 0.1) -> Mapping[str, str]:
    """The routers' reuses by site, for a threshold `theta` in 0..1."""
    refuse_other_kinds("a Learning-to-Cache router", sites, {"attn", "ff"})
    routers = data["routers"]
    if not isinstance(routers, (Mapping, Sequence)):
        raise FileFormatError(f"routers is {type(routers).__name__}; expected one vector of logits per step")
    routers = [routers[key] for key in keys_in_order(routers)] if isinstance(routers, Mapping) else list(routers)
    refuse_other_length("routers", len(routers), steps, "vectors")
    width, reused = len(sites_of(sites, "attn")) + len(sites_of(sites, "ff")), []
    for index in reversed(range(steps)):
        hits = skipped(f"routers[{index}]", routers[index], width, theta)
        reused.append(torch.zeros_like(hits) if index % 2 else hits)
    return router_letters(sites, reused)


L2C_ROUTER = Importer(recognizes, actions, source="Learning-to-Cache router (DiT), arXiv 2406.01733")
