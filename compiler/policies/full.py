"""Compute everything at every step."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.plan import Site


def full(sites: Sequence[Site], steps: int, stats: Any = None) -> Mapping[str, str]:
    """No action but COMPUTE: the baseline that every other plan is compared with."""
    return {}


FULL = Policy(full, source="the model itself")
