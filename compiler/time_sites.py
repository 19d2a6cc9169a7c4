"""How long the operations take that a reuse of each site would save."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from stepgraph.compiler.passes.context import markers
from stepgraph.compiler.sites import MarkedGraph, saved_by
from stepgraph.plan import joint_calls


def time_sites(model: nn.Module, marked: MarkedGraph, inputs: Mapping[str, torch.Tensor], repeats: int = 3) -> torch.Tensor:
    """Milliseconds per site, [sites] float64: the sum over the nodes that only this site needs.

    The traced graph runs node by node, after one run to warm up; of every node the fastest of `repeats` counts. A GPU is waited
    for after every node.

    Args:
        model: Whose weights are used.
        marked: Its graph with sites.
        inputs: Real arguments of the forward, by name.
        repeats: Timed runs.
    """
    gm = marked.trace.bind(model, marked.graph)
    ordered = [inputs[name] for name in marked.trace.inputs]
    best: dict[fx.Node, float] = {}
    with torch.no_grad():
        for number in range(repeats + 1):
            clock = _Clock(gm, ordered[0].device)
            clock.run(*ordered)
            if number:
                best = {node: min(taken, best.get(node, taken)) for node, taken in clock.seconds.items()}
    times = torch.zeros(len(marked.sites), dtype=torch.float64)
    ends = dict(markers(marked.graph))
    for index, marker in ends.items():
        times[index] = 1e3 * sum(best.get(node, 0.0) for node in saved_by(marker))
    for first, *rest in joint_calls(marked.sites):
        # As with MACs, what only all outputs of a call save together stands with the first.
        together = saved_by(*(ends[i] for i in (first, *rest)))
        times[first] = 1e3 * sum(best.get(node, 0.0) for node in together) - times[rest].sum()
    return times


class _Clock(fx.Interpreter):
    """Times every node of one run."""

    def __init__(self, gm: fx.GraphModule, device: torch.device) -> None:
        super().__init__(gm)
        self.device = device
        self.seconds: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        started = time.perf_counter()
        result = super().run_node(n)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[n] = time.perf_counter() - started
        return result
