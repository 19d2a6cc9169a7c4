"""Take the markers out again."""

from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.compiler.marking.mark_sites import unmark


def erase_markers(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Replace every marker by the value it marks.

    Before: `%value = site_value(%ff, site=...)`, `%gated = mul(%gate, %value)`. After: `%gated = mul(%gate, %ff)`.
    """
    return unmark(gm.graph)
