"""InvarDiff's cache books for FLUX (arXiv 2512.05134, zihaowu25/InvarDiff).

`step_cache_book` [T], `transformer_cache_book` with one table [T][double blocks] per module, `single_transformer_cache_book`
with one table [T][single blocks] per module; true means reuse. A reused step takes the image tokens before the output head from
the cache: the site `hidden`. The first step is computed as a whole, whatever the book says of it. A double block's attention is
skipped only where `attn` and `context_attn` both say so; `ip_attn` repeats `attn` and belongs to image prompt adapters. A
single block's `proj_out` is always run. What a book has no table of is computed.
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
from stepgraph.errors import MismatchError
from stepgraph.plan import COMPUTE, REUSE, CachePlan, Site

STEPS = "step_cache_book"
DOUBLE = ("attn", "context_attn", "ff", "context_ff")
SINGLE = ("attn", "mlp")
KINDS = {*DOUBLE, *SINGLE}
BOOKS = {"transformer_cache_book": DOUBLE, "single_transformer_cache_book": SINGLE}


def recognizes(data: Any) -> bool:
    """An object with an object of tables for a make of block."""
    return isinstance(data, dict) and bool(set(data) & set(BOOKS))


def actions(data: Mapping[str, Any], sites: Sequence[Site], steps: int) -> Mapping[str, str]:
    """The book's reuses by site."""
    refuse_other_kinds("an InvarDiff cache book for FLUX", sites, KINDS)
    reused = {}
    if STEPS in data:
        reused["hidden"] = _columns([[flag] for flag in check_table(STEPS, data[STEPS], steps)])[0]
    for book in [book for book in BOOKS if book in data]:
        by_kind = _sites(sites, book)
        tables = _tables(data, book, by_kind, steps)
        if book == "transformer_cache_book":
            pairs = zip(tables.pop("attn", ()), tables.pop("context_attn", ()), strict=False)
            joint = [[image and text for image, text in zip(*pair, strict=True)] for pair in pairs]
            if joint:
                tables |= {"attn": joint, "context_attn": joint}
        for kind in tables:
            reused |= dict(zip((site.name for site in by_kind[kind]), _columns(tables[kind]), strict=True))
    return reused


def _sites(sites: Sequence[Site], book: str) -> dict[str, list[Site]]:
    """The sites that a book's tables speak of: an attention with a second output is a double block's."""
    joint = {site.path for site in sites if site.kind == "context_attn"}
    double = book == "transformer_cache_book"
    return {
        kind: [site for site in sites_of(sites, kind) if kind != "attn" or (site.path in joint) == double]
        for kind in BOOKS[book]
    }


def _tables(data: Mapping[str, Any], book: str, by_kind: Mapping[str, Sequence[Site]], steps: int) -> dict[str, list[Any]]:
    """A book's tables by kind, as far as it has them."""
    tables = data[book]
    known = {*by_kind, "ip_attn"} if book == "transformer_cache_book" else {*by_kind}
    keys = set(tables) if isinstance(tables, dict) else {type(tables).__name__}
    if not isinstance(tables, dict) or not keys <= known:
        raise MismatchError(
            f"{book} has the keys {', '.join(sorted(map(str, keys)))}; expected some of {', '.join(sorted(known))} "
            f"with one table [{steps}][{len(next(iter(by_kind.values())))}] each"
        )
    present = [kind for kind in by_kind if kind in tables]
    return {kind: check_table(f"{book}.{kind}", tables[kind], steps, len(by_kind[kind])) for kind in present}


def _columns(table: Sequence[Sequence[Any]]) -> list[str]:
    """Letters by block from flags by step and block; nothing is stored before the first step."""
    return [COMPUTE + letters(column[1:]) for column in zip(*table, strict=True)]


def export(plan: CachePlan) -> dict[str, Any]:
    """A plan as a cache book; on reused steps every module counts as reused, as in the published books.

    Raises:
        PlanError: The plan does something that a book cannot say.
    """
    refuse_other_kinds("a cache book for FLUX", plan.sites, KINDS)
    refuse_more_than_reuse("a cache book", plan, {"hidden", *KINDS})
    columns = {site.name: [row[i] for row in plan.rows] for i, site in enumerate(plan.sites)}
    written: dict[str, Any] = {"step_cache_book": [letter == REUSE for letter in columns["hidden"]]}
    for book, kinds in BOOKS.items():
        by_kind = _sites(plan.sites, book)
        written[book] = {
            kind: [[columns[site.name][step] != COMPUTE for site in by_kind[kind]] for step in range(plan.steps)]
            for kind in kinds
        }
    double = written["transformer_cache_book"]
    double["ip_attn"] = [list(row) for row in double["attn"]]
    return written


INVARDIFF_FLUX_BOOK = Importer(recognizes, actions, source="InvarDiff cache book (FLUX), arXiv 2512.05134")
