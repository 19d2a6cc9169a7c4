"""What an importer of a published plan format is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepgraph.plan import COMPUTE, REUSE, PlanError, Site


@dataclass(frozen=True)
class Importer:
    """One published format.

    Attributes:
        recognizes: Whether parsed file contents are of this format.
        actions: (contents, sites, T, **options) -> actions over time by site or kind, as `CachePlan.build` takes them.
        source: Where the format comes from.
    """

    recognizes: Callable[[Any], bool]
    actions: Callable[..., Mapping[str, str]]
    source: str


def check_table(name: str, table: Any, rows: int, columns: int | None = None) -> list[Any]:
    """A list of `rows` flags, or of `rows` lists of `columns` flags, as it came from a file.

    Raises:
        PlanError: The message names the key and the shape that was expected.
    """
    expected = f"[{rows}]" if columns is None else f"[{rows}][{columns}]"
    if not isinstance(table, list) or len(table) != rows:
        found = f"a list of {len(table)}" if isinstance(table, list) else type(table).__name__
        raise PlanError(f"{name} is {found}; expected {expected} for this model and number of steps")
    for number, entry in enumerate(table):
        if columns is not None and (not isinstance(entry, list) or len(entry) != columns):
            found = f"a list of {len(entry)}" if isinstance(entry, list) else repr(entry)
            raise PlanError(f"{name}[{number}] is {found}; expected {expected} for this model and number of steps")
        flags = entry if isinstance(entry, list) else [entry]
        bad = [flag for flag in flags if flag not in (0, 1)]
        if bad:
            raise PlanError(f"{name}[{number}] holds {bad[0]!r}; expected true/false or 0/1")
    return table


def letters(reused: Sequence[Any]) -> str:
    """One letter per step from flags that are true where the value is reused."""
    return "".join(REUSE if flag else COMPUTE for flag in reused)


def sites_of(sites: Sequence[Site], kind: str) -> list[Site]:
    """The sites of a kind, in model order."""
    return [site for site in sites if site.kind == kind]
