"""InvarDiff's cache books for DiT (arXiv 2512.05134, zihaowu25/InvarDiff).

`step_cache_book` [T], `msa_cache_book` and `mlp_cache_book` [T][blocks]; true means reuse. A reused step takes the tokens after
the last block from the cache and runs the output head on them with the current timestep: the site `hidden`. Other keys (the
later versions of the format describe the calibration in some) are not read. What a book has no table of is computed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stepgraph.compiler.interfaces.importer import (
    Importer,
    check_table,
    letters,
    refuse_more_than_reuse,
    refuse_other_kinds,
    sites_of,
)
from stepgraph.plan import REUSE, CachePlan, Site

STEPS = "step_cache_book"
TABLES = {"msa_cache_book": "attn", "mlp_cache_book": "ff"}


def recognizes(data: Any) -> bool:
    """An object with a table per module kind, or of steps alone."""
    return isinstance(data, dict) and bool(set(data) & set(TABLES) or set(data) == {STEPS})


def actions(data: Mapping[str, Any], sites: Sequence[Site], steps: int) -> Mapping[str, str]:
    """The book's reuses by site."""
    refuse_other_kinds("an InvarDiff cache book for DiT", sites, set(TABLES.values()))
    reused = {"hidden": letters(check_table(STEPS, data[STEPS], steps))} if STEPS in data else {}
    for key, kind in TABLES.items():
        if key not in data:
            continue
        sites_of_kind = sites_of(sites, kind)
        table = check_table(key, data[key], steps, len(sites_of_kind))
        reused |= {site.name: letters([row[i] for row in table]) for i, site in enumerate(sites_of_kind)}
    return reused


def export(plan: CachePlan) -> dict[str, Any]:
    """A plan as a cache book; on reused steps every module counts as reused, as in the published books.

    Raises:
        PlanError: The plan does something that a book cannot say.
    """
    refuse_other_kinds("a cache book for DiT", plan.sites, set(TABLES.values()))
    refuse_more_than_reuse("a cache book", plan, {"hidden", *TABLES.values()})
    columns = {site.name: [row[i] for row in plan.rows] for i, site in enumerate(plan.sites)}
    book: dict[str, Any] = {"step_cache_book": [letter == REUSE for letter in columns["hidden"]]}
    for key, kind in TABLES.items():
        columns_of_kind = [columns[site.name] for site in sites_of(plan.sites, kind)]
        book[key] = [[column[step] != "C" for column in columns_of_kind] for step in range(plan.steps)]
    return book


INVARDIFF_BOOK = Importer(recognizes, actions, source="InvarDiff cache book (DiT), arXiv 2512.05134")
