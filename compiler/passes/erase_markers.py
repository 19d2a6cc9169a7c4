"""Take the markers out again."""

from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext, markers


def erase_markers(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Replace every marker by the value it marks.

    Before: `%value = site_value(%ff, site=...)`, `%gated = mul(%gate, %value)`. After: `%gated = mul(%gate, %ff)`.
    """
    count = 0
    for _, marker in markers(gm.graph):
        value = marker.args[0]
        assert isinstance(value, fx.Node)
        marker.replace_all_uses_with(value)
        gm.graph.erase_node(marker)
        count += 1
    return count
