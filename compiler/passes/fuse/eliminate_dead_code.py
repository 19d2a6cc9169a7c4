"""Remove what the outputs do not depend on."""

from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.compiler.marking.graphs import erase_dead


def eliminate_dead_code(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Erase every node that no output depends on; returns how many went.

    A node that writes in place stays while anything that lives in the same storage does (torch.fx's own elimination
    would drop it for having no users). Inputs of the model stay, so that all variants are called alike.

    Before, with nothing reading the feed-forward of a reused site::

        %norm3 = call_module[transformer_blocks.0.norm3](%add)
        %fc1 = call_module[transformer_blocks.0.ff.net.0.proj](%modulated)
        %gated = mul(%gate, %slot)

    After::

        %gated = mul(%gate, %slot)
    """
    return erase_dead(gm.graph)
