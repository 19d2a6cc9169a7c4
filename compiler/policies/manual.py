"""A plan written by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepgraph.compiler.policies.policy import Policy
from stepgraph.plan import Site


def manual(sites: Sequence[Site], steps: int, stats: Any = None, *, actions: Mapping[str, str]) -> Mapping[str, str]:
    """The given actions over time by site or kind, such as {"ff": "CRCR", "hidden": "CCRC"}."""
    return actions


MANUAL = Policy(manual, source="the user")
