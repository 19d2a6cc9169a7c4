"""Rows of measurements that are written as they are made, so that whatever ends a process leaves those before it."""

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stepgraph.bench.record import provenance

# Per part, its figures by the name of a row.
Figures = dict[str, dict[str, dict[str, Any]]]
BEGUN = "begun"
# What models, compilers and devices fail with; the rows after such a one are measured nevertheless.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class Rows:
    """A file with one JSON object a line; a part that begins anew takes the place of its rows before."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, part: str, device: str) -> None:
        """A part begins on a device; what it wrote in an earlier call counts no more."""
        self._append({"part": part, "row": BEGUN, **provenance(device)})

    def add(self, part: str, row: str, **figures: Any) -> None:
        """Write a row; one of the same name takes its place."""
        self._append({"part": part, "row": row, **figures})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> Figures:
        """All rows that count. A last line that was cut off does not."""
        figures: Figures = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        for text in lines:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            part, row = line.pop("part"), line.pop("row")
            if row == BEGUN:
                figures[part] = {}
            figures.setdefault(part, {})[row] = line
        return figures


def write_all(rows: Rows | None, part: str, name: str, measure: Callable[[], Iterator[tuple[str, dict[str, Any]]]]) -> None:
    """Write the rows that are measured, as each is done; what fails is a row with the reason, and nothing is raised.

    Args:
        rows: Where to; None writes nothing.
        part: Of which they are rows.
        name: What is measured: a failure is the row "NAME: failed".
        measure: Yields names of rows and figures.
    """
    try:
        for row, figures in measure():
            print(f"{part}: {row}: {figures}", file=sys.stderr, flush=True)
            if rows is not None:
                rows.add(part, row, **figures)
    except FAILURES as error:
        traceback.print_exc()
        if rows is not None:
            rows.add(part, f"{name}: failed", failed=f"{type(error).__name__}: {str(error)[:500]}")
