"""Whole numbers that say rows of a model's tables, such as class labels: numbers that no row has are refused."""

from collections.abc import Mapping
from typing import Any

import torch

from stepgraph.errors import ArgumentError
from stepgraph.runtime.program.bound_weights import version_of
from stepgraph.runtime.program.tables import waits


class RowNumbers:
    """Looks at the row numbers that a run is given: at once on a CPU, elsewhere on the device, which is read at the run's end.

    On a device a tensor is looked at once, and again when it was written to. Compiled regions take negative numbers for rows
    counted from a table's end, where the eager model refuses them.
    """

    def __init__(self) -> None:
        self._outside: dict[tuple[str, int], torch.Tensor] = {}
        # Held, so that no other tensor takes the place of one that was looked at.
        self._seen: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}

    def look(self, rows: Mapping[str, int], inputs: Mapping[str, Any]) -> None:
        """Look at the numbers of one call.

        Args:
            rows: How many there are, by the input that says which.
            inputs: The model's, flat.

        Raises:
            ArgumentError: A number is no row, and is known without waiting.
        """
        for name, count in rows.items():
            value = inputs.get(name)
            if not isinstance(value, torch.Tensor) or not value.numel() or value.is_floating_point():
                continue
            if not waits(value.device):
                least, most = (int(bound) for bound in value.aminmax())
                if least < 0 or most >= count:
                    raise _refusal(name, count, f"holds {least if least < 0 else most}")
            elif not self._was_seen(name, value):
                self._seen[name, id(value)] = value, version_of(value)
                outside = ((value < 0) | (value >= count)).any()
                key = name, count
                self._outside[key] = outside | self._outside[key] if key in self._outside else outside

    def _was_seen(self, name: str, value: torch.Tensor) -> bool:
        """Whether this very tensor was looked at, and not written to since; one without a version may have been."""
        seen, version = self._seen.get((name, id(value))), version_of(value)
        return seen is not None and version >= 0 and seen[1] == version

    def finish(self) -> None:
        """Read what the device found.

        Raises:
            ArgumentError: A number was no row.
        """
        for (name, count), outside in self._outside.items():
            if bool(outside):
                raise _refusal(name, count, "holds a number outside these in a call of this run")


def _refusal(name: str, count: int, what: str) -> ArgumentError:
    return ArgumentError(f"{name} {what}; expected whole numbers in 0..{count - 1}, the rows of the model's table")
