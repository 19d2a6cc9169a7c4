"""How long the operations take that a reuse of each site would save."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from stepgraph.compiler.interfaces.pass_context import markers
from stepgraph.compiler.marking.mark_sites import MarkedGraph, savings


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
        for run in range(repeats + 1):
            timer = _NodeTimer(gm, ordered[0].device)
            timer.run(*ordered)
            if run:
                best = {node: min(taken, best.get(node, taken)) for node, taken in timer.seconds.items()}
    nodes = [marker for _, marker in markers(marked.graph)]
    seconds = savings(nodes, marked.sites, lambda saved: sum(best.get(node, 0.0) for node in saved))
    return 1e3 * torch.tensor(seconds, dtype=torch.float64)


class _NodeTimer(fx.Interpreter):
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
