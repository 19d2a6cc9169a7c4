"""DeepCache-style: reuse the blocks in the middle, compute those at the ends (arXiv 2312.00858, carried over to a stack)."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepgraph.checks import check_number, check_whole
from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.errors import ArgumentError
from stepgraph.plan import COMPUTE, MODULE_KINDS, REUSE, Site

REUSES = ("modules", "output")


def deepcache(
    sites: Sequence[Site],
    steps: int,
    stats: Any = None,
    *,
    every: int = 3,
    first: int = 1,
    last: int | None = None,
    reuse: str = "modules",
    power: float | None = None,
    center: int | None = None,
) -> Mapping[str, str]:
    """Between full steps, which come every `every` steps, a range of blocks is reused and the others are computed.

    In the U-Net of the paper a skip connection carries fresh shallow features around the reused deep part. In a transformer
    the residual stream does: with reuse="modules" every attention and feed-forward output of the range comes from the cache
    and is added, with a fresh gate, to fresh tokens. With reuse="output" the tokens behind the range are reused, so that
    nothing before them runs and only the last blocks are fresh.

    Args:
        sites: The model's sites.
        steps: T.
        stats: Not used.
        every (steps, at least 1): The period N.
        first (block, from 0): Index of the first block of the range.
        last (block): Index of the block behind the range; without it all but the last block belong to it.
        reuse: "modules" or "output"; the latter needs first=0 and a model with sites of kind `block`.
        power: Makes the full steps non-uniform: dense around `center`, at int(x^power) + center, with the sign kept, for
            round(T / N) points x evenly spaced from (-center)^(1/power) to (T - center)^(1/power); points that meet on a step
            make one full step (the paper's quadratic schedule). Uniform unless given; at least 1.
        center: Step around which the full steps are dense; T // 3 unless given.

    Raises:
        PlanError: An argument out of range.
    """
    blocks = _blocks(sites)
    last = len(blocks) - 1 if last is None else last
    least = 0
    for name, value, most in (("first", first, len(blocks) - 1), ("last", last, len(blocks))):
        check_whole(name, value, least, most, where=f" of {len(blocks)} blocks")
        least = value + 1
    check_whole("every", every, 1)
    if reuse not in REUSES:
        raise ArgumentError(f"reuse is {reuse!r}; expected one of {', '.join(REUSES)}")
    full = _full_steps(steps, every, power, center)
    letters = "".join(COMPUTE if step in full else REUSE for step in range(steps))
    if reuse == "modules":
        inside = {name for block in blocks[first:last] for name in block}
        return {site.name: letters for site in sites if site.name in inside}
    path = sites_path(blocks[last - 1])
    if first != 0 or not any(site.kind == "block" and site.path == path for site in sites):
        raise ArgumentError(f"reuse='output' needs first=0 and block sites; first is {first}, the range ends with {path}")
    return {path: letters}


def _blocks(sites: Sequence[Site]) -> list[list[str]]:
    """Names of the module sites of each block, in order."""
    by_block: dict[str, list[str]] = {}
    for site in sites:
        if site.kind in MODULE_KINDS:
            by_block.setdefault(site.path.rpartition(".")[0], []).append(site.name)
    return list(by_block.values())


def sites_path(block: Sequence[str]) -> str:
    """Path of the block that module sites belong to."""
    return block[0].rpartition(".")[0]


def _full_steps(steps: int, every: int, power: float | None, center: int | None) -> set[int]:
    if power is None:
        if center is not None:
            raise ArgumentError(f"center is {center!r}, but it shapes the non-uniform schedule only; give power too")
        return set(range(0, steps, every))
    center = steps // 3 if center is None else center
    check_number("power", power, 1)
    check_whole("center", center, 0, steps - 1)
    count = max(1, round(steps / every))
    low, high = -(center ** (1 / power)), (steps - center) ** (1 / power)
    points = [low + (high - low) * i / count for i in range(count)]
    return {0} | {int(abs(x) ** power * (1 if x >= 0 else -1)) + center for x in points}


DEEPCACHE = Policy(deepcache, source="DeepCache, arXiv 2312.00858, on a transformer's blocks")
