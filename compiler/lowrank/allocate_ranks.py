"""Ranks under a budget of multiply-accumulates: where another few terms take most off the error for what they cost."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from stepgraph.checks import check_number, check_whole
from stepgraph.errors import ArgumentError


@dataclass(frozen=True)
class RankedMap:
    """A linear map as the allocation sees it.

    Attributes:
        weights: Squared error that each term takes off, falling, [k].
        outputs: C_out.
        inputs: C_in.
        rows: Tokens that go through it in an evaluation.
    """

    weights: Tensor
    outputs: int
    inputs: int
    rows: int

    @property
    def macs(self) -> int:
        """Of the map itself."""
        return self.rows * self.outputs * self.inputs

    def cost(self, rank: int) -> int:
        """Multiply-accumulates of A B x."""
        return self.rows * rank * (self.outputs + self.inputs)

    @property
    def most(self) -> int:
        """The largest rank at which A B x costs no more than the map itself."""
        return max(min(self.outputs * self.inputs // (self.outputs + self.inputs), len(self.weights)), 1)

    def gain(self, start: int, stop: int) -> float:
        """Squared error that terms start..stop - 1 take off."""
        return float(self.weights[start:stop].sum())


def allocate_ranks(maps: Mapping[str, RankedMap], budget: float, chunk: int = 8) -> dict[str, int]:
    """A rank for every map, in steps of `chunk`, greedily by gain per multiply-accumulate.

    Every map gets one chunk; then the next chunk goes to where it takes most squared error off per multiply-accumulate, as
    long as it fits. Gains only fall with the rank, so this is the best allocation of what it
    spends, and short of the best one of the whole budget by less than one chunk's gain. No map gets a rank at which the
    correction costs more than the map.

    Args:
        maps: By module path.
        budget: Share of the maps' own multiply-accumulates that A B x of all of them may cost; 0.25 is a quarter.
        chunk: How many ranks are given at a time.

    Raises:
        PlanError: The budget or chunk is out of range, or too small for one chunk per map.
    """
    check_number("budget", budget, above=0, most=1, what="a share of the linear maps' own cost")
    check_whole("chunk", chunk, 1)
    whole = sum(ranked_map.macs for ranked_map in maps.values())
    ranks = {path: min(chunk, ranked_map.most) for path, ranked_map in maps.items()}
    spent = sum(ranked_map.cost(ranks[path]) for path, ranked_map in maps.items())
    if spent > budget * whole:
        raise ArgumentError(
            f"a budget of {budget:g} does not give every map rank {chunk}, which takes {spent / whole:.3g}; raise it, lower "
            f"chunk, or leave maps out by kinds"
        )
    queue: list[tuple[float, str]] = []

    def offer(path: str) -> None:
        ranked_map, rank = maps[path], ranks[path]
        if rank < ranked_map.most:
            stop = min(rank + chunk, ranked_map.most)
            heapq.heappush(queue, (-ranked_map.gain(rank, stop) / ranked_map.cost(stop - rank), path))

    for path in maps:
        offer(path)
    while queue:
        _, path = heapq.heappop(queue)
        ranked_map, stop = maps[path], min(ranks[path] + chunk, maps[path].most)
        cost = ranked_map.cost(stop - ranks[path])
        # A map whose next chunk does not fit is done; cheaper chunks of others may still fit.
        if spent + cost <= budget * whole:
            spent, ranks[path] = spent + cost, stop
            offer(path)
    return ranks
