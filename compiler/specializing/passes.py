"""The order of all passes, and when one is left out."""

from collections.abc import Callable
from typing import Any

from stepgraph.compiler.passes.fuse.choose_providers import choose_providers, choose_references
from stepgraph.compiler.passes.fuse.eliminate_dead_code import eliminate_dead_code
from stepgraph.compiler.passes.fuse.erase_identities import erase_identities
from stepgraph.compiler.passes.fuse.fold_constants import fold_constants
from stepgraph.compiler.passes.fuse.fuse_gated_residual import fuse_gated_residual
from stepgraph.compiler.passes.fuse.fuse_lowrank import fuse_lowrank
from stepgraph.compiler.passes.fuse.fuse_modulated_norm import fuse_modulated_norm
from stepgraph.compiler.passes.program.fold_sums import fold_sums
from stepgraph.compiler.passes.program.hoist_conditioning import hoist_conditioning
from stepgraph.compiler.passes.program.merge_projections import merge_projections
from stepgraph.compiler.passes.sites.add_slots import add_slots
from stepgraph.compiler.passes.sites.erase_markers import erase_markers
from stepgraph.compiler.passes.sites.forecast_site import forecast_site
from stepgraph.compiler.passes.sites.lowrank_site import lowrank_site
from stepgraph.compiler.passes.sites.reuse_site import reuse_site
from stepgraph.compiler.passes.sites.split_projections import split_projections
from stepgraph.compiler.passes.sites.store_site import store_site
from stepgraph.config import CompileConfig

# (what is rewritten, its context) -> number of rewrites.
Pass = Callable[[Any, Any], int]

# Over the marked graph, before rows are made of it: (graph, ModelContext). Where two values meet in one projection, each is
# stored as its own part of the product.
MODEL_PASSES: tuple[Pass, ...] = (split_projections,)

# Over every distinct row: (graph, PassContext). Inputs for stored values come first, in the order in which a session passes
# them. Values are replaced before any is returned. Markers go before dead code does: a residual's marker reads the tokens that
# go into the stack, which are dead where nobody stores the residual. What is left is fused, the neighbours of a low-rank
# increment after their own parts. Providers are chosen last.
ROW_PASSES: tuple[Pass, ...] = (
    add_slots, lowrank_site, reuse_site, forecast_site, store_site, erase_markers, eliminate_dead_code, erase_identities,
    fuse_modulated_norm, fuse_gated_residual, fuse_lowrank, fold_constants, choose_references, choose_providers,
)  # fmt: skip

# Over all rows together: (RowGraphs, ProgramContext). Sums are folded before what depends on the prompt or the timestep alone
# leaves the loop; what then still reads one value in the loop is multiplied with it at once.
PROGRAM_PASSES: tuple[Pass, ...] = (fold_sums, hoist_conditioning, merge_projections)

# Rounding changes, or another kernel runs: exact programs leave these out.
INEXACT = frozenset((
    split_projections, erase_identities, fuse_modulated_norm, fuse_gated_residual, fuse_lowrank, fold_constants,
    choose_providers, fold_sums,
))  # fmt: skip
# Without these there is no program: nothing leaves them out.
NEEDED = frozenset((
    add_slots, lowrank_site, reuse_site, forecast_site, store_site, erase_markers, choose_references, choose_providers,
))  # fmt: skip
# What the options of `CompileConfig` decide.
ASKED: dict[Pass, Callable[[CompileConfig], bool]] = {
    choose_references: lambda config: config.exact,
    hoist_conditioning: lambda config: config.hoist,
    merge_projections: lambda config: config.merge and config.packs,
}


def is_wanted(rewrite: Pass, config: CompileConfig) -> bool:
    """Whether a pass runs under some options; what STEPGRAPH_DISABLE_PASS says of it is the runner's."""
    asked = ASKED.get(rewrite)
    return not (config.exact and rewrite in INEXACT) and (asked is None or asked(config))
