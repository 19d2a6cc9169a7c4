"""Policies, one file each."""

from stepgraph.compiler.policies.full import FULL
from stepgraph.compiler.policies.interval import INTERVAL
from stepgraph.compiler.policies.manual import MANUAL
from stepgraph.compiler.policies.policy import Policy

POLICIES: dict[str, Policy] = {"full": FULL, "interval": INTERVAL, "manual": MANUAL}
