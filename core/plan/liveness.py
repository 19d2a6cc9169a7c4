"""When a plan's stored values live: from the COMPUTE that stores them to the last step that reads them."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from stepgraph.inputs import latents_of
from stepgraph.plan.plan import CachePlan
from stepgraph.plan.site import COMPUTE, FORECAST, LOWRANK, READS_STORED

# What a COMPUTE can leave behind: the site's value; the outputs and rank-space inputs of the linear maps inside it; the
# model's latent input at that step.
VALUE, MAPS, INPUT = "value", "maps", "input"
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class Stored(NamedTuple):
    """A stored value: the site's index, what of it, and the step that stored it."""

    site: int
    part: str
    step: int


class Read(NamedTuple):
    """A stored value as the step that reads it sees it: age 1 is the last one stored."""

    site: int
    part: str
    age: int


@dataclass(frozen=True)
class StepTraffic:
    """What one step does with stored values.

    Attributes:
        reads: What the step reads, by site, part and age.
        sources: The same values with the steps that stored them.
        stores: What the step computes and a later step reads, by site and part.
        frees: What no later step reads: dropped at the end of the step.
    """

    reads: tuple[Read, ...]
    sources: tuple[Stored, ...]
    stores: tuple[Stored, ...]
    frees: tuple[Stored, ...]


def reads_of(plan: CachePlan, step: int) -> Iterator[Read]:
    """What the actions of a step read, by site, part and age."""
    for i, action in enumerate(plan.rows[step]):
        # The maps of a joint call are kept with its first output.
        if action not in READS_STORED or (action == LOWRANK and plan.sites[i].output):
            continue
        forecast = plan.forecasts.get((step, i))
        # A FORECAST that has no coefficients yet counts as one of the last value.
        ages = forecast.ages if forecast else (1,)
        reads = {Read(i, MAPS if action == LOWRANK else VALUE, age) for age in ages}
        if forecast and action == FORECAST:
            reads |= {Read(i, INPUT, age) for age in forecast.inputs if age}
        yield from sorted(reads)


def traffic(plan: CachePlan, folded: Collection[int] = ()) -> tuple[StepTraffic, ...]:
    """The stored-value traffic of every step.

    Args:
        plan: The plan.
        folded: Sites whose values are kept as part of another's, and neither read nor stored themselves.
    """
    history: list[list[int]] = [[] for _ in plan.sites]
    read: list[tuple[tuple[Read, ...], tuple[Stored, ...]]] = []
    last_read: dict[Stored, int] = {}
    for step, row in enumerate(plan.rows):
        reads = tuple(read for read in reads_of(plan, step) if read.part != VALUE or read.site not in folded)
        sources = tuple(Stored(site, part, history[site][-age]) for site, part, age in reads)
        last_read |= dict.fromkeys(sources, step)
        read.append((reads, sources))
        for i, action in enumerate(row):
            if action == COMPUTE:
                history[i].append(step)
    stores: list[list[Stored]] = [[] for _ in plan.rows]
    frees: list[list[Stored]] = [[] for _ in plan.rows]
    for stored, last in sorted(last_read.items()):
        stores[stored.step].append(stored)
        frees[last].append(stored)
    return tuple(
        StepTraffic(reads, sources, tuple(stored), tuple(freed))
        for (reads, sources), stored, freed in zip(read, stores, frees, strict=True)
    )


def bytes_of(plan: CachePlan, stored: Stored) -> int:
    """Size of a stored value per sample. LOWRANK sites are counted with one value where the plan is not bound to factors."""
    if stored.part == INPUT:
        return BYTES[plan.header.dtype] * prod(latents_of(plan.header.shapes))
    if stored.part == MAPS and stored.site in plan.increments:
        return plan.increments[stored.site].bytes
    return plan.sites[stored.site].bytes


def peak_bytes(plan: CachePlan) -> int:
    """The most bytes of stored values held at once, per sample, over all branches.

    A step's stored values are complete before those it read for the last time are dropped; branches take turns.
    """
    held: set[Stored] = set()
    rest = peak = 0
    branches = len(plan.header.branches)
    for step in traffic(plan):
        held |= set(step.stores)
        full = sum(bytes_of(plan, stored) for stored in held)
        held -= set(step.frees)
        after = sum(bytes_of(plan, stored) for stored in held)
        # While branch b runs, the ones before it have finished the step and the ones behind it have not begun.
        peak = max(peak, *(b * after + full + (branches - 1 - b) * rest for b in range(branches)))
        rest = after
    return peak
