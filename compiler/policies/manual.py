"""A plan written by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.errors import ArgumentError
from stepgraph.plan import Site


def manual(sites: Sequence[Site], steps: int, stats: Any = None, *, actions: Mapping[str, str]) -> Mapping[str, str]:
    """The given actions over time.

    Args:
        sites: The model's sites.
        steps: T.
        stats: Not used.
        actions (T letters, C R L F): By site or kind, such as {"ff": "CRCR", "hidden": "CCRC"}.

    Raises:
        PlanError: Not a mapping.
    """
    if not isinstance(actions, Mapping):
        raise ArgumentError(
            f"actions is {actions!r}; expected sites or kinds with one letter per step, such as {{'ff': 'CRCR'}}"
        )
    return actions


MANUAL = Policy(manual, source="the user")
