"""Cache plans: their vocabulary (sites, kinds, actions), their header, and the plans themselves."""

from stepgraph.checks import LARGEST
from stepgraph.errors import PlanError
from stepgraph.plan.corrections import Forecast, Increment
from stepgraph.plan.header import BRANCHES, DTYPES, PlanHeader
from stepgraph.plan.plan import FORMAT, VERSION, CachePlan
from stepgraph.plan.site import (
    COMPUTE,
    DEAD,
    FORECAST,
    KINDS,
    LOWRANK,
    MODULE_KINDS,
    POSSIBLE,
    READS_STORED,
    REPLACED,
    REUSE,
    STREAM_KINDS,
    Action,
    Site,
    canonical,
    containers,
    first_live,
    joint_calls,
)

__all__ = [
    "BRANCHES",
    "COMPUTE",
    "DEAD",
    "DTYPES",
    "FORECAST",
    "FORMAT",
    "KINDS",
    "LARGEST",
    "LOWRANK",
    "MODULE_KINDS",
    "POSSIBLE",
    "READS_STORED",
    "REPLACED",
    "REUSE",
    "STREAM_KINDS",
    "VERSION",
    "Action",
    "CachePlan",
    "Forecast",
    "Increment",
    "PlanError",
    "PlanHeader",
    "Site",
    "canonical",
    "containers",
    "first_live",
    "joint_calls",
]  # fmt: skip
