"""Policies, one file each."""

from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.compiler.policies.deepcache import DEEPCACHE  # noqa: TID251
from stepgraph.compiler.policies.full import FULL  # noqa: TID251
from stepgraph.compiler.policies.interval import INTERVAL  # noqa: TID251
from stepgraph.compiler.policies.invardiff import INVARDIFF  # noqa: TID251
from stepgraph.compiler.policies.l2c import L2C  # noqa: TID251
from stepgraph.compiler.policies.magcache import MAGCACHE  # noqa: TID251
from stepgraph.compiler.policies.manual import MANUAL  # noqa: TID251
from stepgraph.compiler.policies.procache import PROCACHE  # noqa: TID251
from stepgraph.compiler.policies.smoothcache import SMOOTHCACHE  # noqa: TID251
from stepgraph.compiler.policies.teacache import TEACACHE  # noqa: TID251
from stepgraph.compiler.policies.whole_step import WHOLE_STEP  # noqa: TID251

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
