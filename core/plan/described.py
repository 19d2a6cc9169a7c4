"""The header and the sites that files other than plans carry, such as statistics and routers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepgraph.errors import FileFormatError
from stepgraph.plan.header import PlanHeader
from stepgraph.plan.json import parse_record
from stepgraph.plan.site import Site


def described_sites(described: Mapping[str, Any], path: str | Path) -> tuple[PlanHeader, tuple[Site, ...]]:
    """The header and the sites that a record's metadata holds.

    Raises:
        PlanError: They are incomplete or not valid.
    """
    header = parse_record(PlanHeader, described.get("header"), f"{path}: header")
    sites = described.get("sites")
    if not isinstance(sites, list):
        raise FileFormatError(f"{path}: sites is {type(sites).__name__}; expected a list")
    return header, tuple(parse_record(Site, site, f"{path}: site {i}") for i, site in enumerate(sites))
