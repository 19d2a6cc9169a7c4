"""The plans that the runtime is measured with: published ones where they are at hand, and FORA's."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from stepgraph.bench.record import CHECKOUT
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.planning.import_plan import import_plan
from stepgraph.errors import ArgumentError
from stepgraph.plan import CachePlan

PUBLISHED = CHECKOUT.parent / "shared" / "plans"
BOOK, L2C = "invardiff_dit_xl2_50_slow.json", "smoothcache_dit_xl2_50_l2c.json"
NAMES = ("full", "slow", "mask", "l2c", "fora2", "fora3")


def plan_named(name: str, model: nn.Module, scheduler: Any, steps: int, folder: Path = PUBLISHED) -> CachePlan:
    """One of `NAMES`, for a model and its number of blocks and steps.

    Args:
        name: "full" computes everything; "slow" is InvarDiff's slow book of DiT-XL/2, "mask" its step gate alone; "l2c"
            Learning-to-Cache's 50-step schedule; "fora2" and "fora3" reuse all modules of every second step, or two in three.
        model: A model with blocks of an attention and a feed-forward module.
        scheduler: A diffusers scheduler.
        steps: Inference steps. Published plans, of 50 steps and 28 blocks, are read at equal distances for other numbers.
        folder: Where the published files are.

    Raises:
        PlanError: Unknown name, or the file is not there.
    """
    common: dict[str, Any] = {"model": model, "scheduler": scheduler, "steps": steps}
    if name == "full":
        return make_plan("full", **common)
    if name in ("fora2", "fora3"):
        return make_plan("interval", every=int(name[-1]), **common)
    blocks = len(list(model.get_submodule("transformer_blocks").children()))
    if name == "mask":
        return make_plan("manual", actions={"hidden": gates(steps, folder)}, **common)
    if name not in NAMES:
        raise ArgumentError(f"unknown plan {name!r}; known: {', '.join(NAMES)}")
    data = sized_book(steps, blocks, folder) if name == "slow" else sized_schedule(steps, blocks, folder)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / (BOOK if name == "slow" else L2C)
        path.write_text(json.dumps(data), encoding="utf-8")
        return import_plan(path, model, scheduler, steps=steps)


def gates(steps: int, folder: Path = PUBLISHED) -> str:
    """The slow book's step gate: one letter per step."""
    return "".join("R" if flag else "C" for flag in _picked(_read(folder / BOOK)["step_cache_book"], steps))


def sized_book(steps: int, blocks: int, folder: Path = PUBLISHED) -> dict[str, Any]:
    """The slow book for another number of steps and blocks."""
    book = _read(folder / BOOK)
    sized: dict[str, Any] = {"step_cache_book": _picked(book["step_cache_book"], steps)}
    for name in ("msa_cache_book", "mlp_cache_book"):
        sized[name] = [_picked(row, blocks) for row in _picked(book[name], steps)]
    return sized


def sized_schedule(steps: int, blocks: int, folder: Path = PUBLISHED) -> dict[str, Any]:
    """The L2C schedule for another number of steps and blocks."""
    schedule = _read(folder / L2C)
    depth = sum(name.startswith("attn-") for name in schedule)
    return {
        f"{kind}-{i}": _picked(schedule[f"{kind}-{block}"], steps)
        for kind in ("attn", "mlp")
        for i, block in enumerate(_picked(range(depth), blocks))
    }


def _picked(values: Sequence[Any], count: int) -> list[Any]:
    """`count` of the values at equal distances, the first among them; repeated where there are fewer."""
    return [values[i * len(values) // count] for i in range(count)]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ArgumentError(f"no published plan at {path}; say with --plans which folder {path.name} is in")
    return json.loads(path.read_text(encoding="utf-8"))
