"""Policies, one file each."""

from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.compiler.policies.deepcache import DEEPCACHE
from stepgraph.compiler.policies.full import FULL
from stepgraph.compiler.policies.interval import INTERVAL
from stepgraph.compiler.policies.invardiff import INVARDIFF
from stepgraph.compiler.policies.l2c import L2C
from stepgraph.compiler.policies.magcache import MAGCACHE
from stepgraph.compiler.policies.manual import MANUAL
from stepgraph.compiler.policies.procache import PROCACHE
from stepgraph.compiler.policies.smoothcache import SMOOTHCACHE
from stepgraph.compiler.policies.teacache import TEACACHE
from stepgraph.compiler.policies.whole_step import WHOLE_STEP

POLICIES: dict[str, Policy] = {
    "deepcache": DEEPCACHE,
    "full": FULL,
    "interval": INTERVAL,
    "invardiff": INVARDIFF,
    "l2c": L2C,
    "magcache": MAGCACHE,
    "manual": MANUAL,
    "procache": PROCACHE,
    "smoothcache": SMOOTHCACHE,
    "teacache": TEACACHE,
    "whole-step": WHOLE_STEP,
}
