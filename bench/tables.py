"""Tables on the terminal, as benchmarks print what they measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show_rows(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], digits: str = ".4g") -> None:
    """A row for each measurement and a column for each of its figures; numbers stand on the right.

    Args:
        title: Above the table.
        rows: Figures by name; what a row lacks, or has None for, stays empty.
        columns: Names of the figures, in order.
        digits: Format of what is no whole number and no text.
    """
    table = Table(title=title)
    for column in columns:
        is_text = any(isinstance(row.get(column), str) for row in rows)
        table.add_column(column.replace("_", " "), justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(column), digits) for column in columns))
    Console(width=140).print(table)


def show_facts(title: str, facts: Mapping[str, Any], digits: str = ".3g") -> None:
    """A line for each fact; `digits` is the format of what is no whole number and no text."""
    table = Table("what", "value", title=title)
    for name, value in facts.items():
        table.add_row(name, _cell(value, digits))
    Console().print(table)


def _cell(value: Any, digits: str) -> str:
    if value is None:
        return ""
    return f"{value:{digits}}" if isinstance(value, float) else str(value)
