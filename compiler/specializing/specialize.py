"""One static graph per distinct row of a plan, and the passes over the model before and over the program behind."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from stepgraph.compiler.interfaces.pass_context import MapGroup, PassContext
from stepgraph.compiler.interfaces.program_context import ModelContext, ProgramContext, RowGraphs
from stepgraph.compiler.marking.graphs import written_storages
from stepgraph.compiler.marking.mark_sites import MarkedGraph, bound_copy, sized
from stepgraph.compiler.specializing.check_pass import Constants, ModelCheck, ProgramCheck, RowCheck
from stepgraph.compiler.specializing.coefficients import numbered_forecasts
from stepgraph.compiler.specializing.passes import MODEL_PASSES, PROGRAM_PASSES, ROW_PASSES
from stepgraph.compiler.specializing.run_passes import run_passes
from stepgraph.config import CompileConfig
from stepgraph.env import get_logger, read_env
from stepgraph.errors import CompileError
from stepgraph.node_facts import MARKER
from stepgraph.plan import FORECAST, CachePlan
from stepgraph.plan.liveness import traffic

EXACT = CompileConfig("eager", exact=True)
Example = Mapping[str, Any] | None


def rewrite_model(
    marked: MarkedGraph, model: nn.Module, plan: CachePlan, config: CompileConfig, example: Example = None
) -> MarkedGraph:
    """The marked graph behind MODEL_PASSES, and its sites with what their reuse now saves and stores.

    Args:
        marked: Not changed; returned itself where nothing is rewritten.
        model: The model whose weights the graph uses.
        plan: For exactly these sites.
        config: Which passes are wanted.
        example: Real inputs, needed only under STEPGRAPH_CHECK=1.
    """
    gm = bound_copy(marked, model)
    check = ModelCheck(gm, example) if read_env().check and example else None
    if not run_passes(MODEL_PASSES, gm, ModelContext(plan), config, lambda: {"model": gm}, check, before="traced"):
        return marked
    markers = {node.meta[MARKER]: node for node in gm.graph.nodes if MARKER in node.meta}
    sites = sized([markers[i] for i in range(len(marked.sites))], marked.sites, marked.batch)
    return replace(marked, graph=gm.graph, sites=sites)


def specialize(
    marked: MarkedGraph,
    model: nn.Module,
    plan: CachePlan,
    example: Example = None,
    groups: Mapping[int, tuple[MapGroup, ...]] = MappingProxyType({}),
    config: CompileConfig = EXACT,
) -> RowGraphs:
    """Rewrite the marked graph once for every distinct (actions, stores, forecasts' terms) of the plan.

    Args:
        marked: The traced graph with its sites.
        model: The model whose weights the graphs use.
        plan: A plan for exactly these sites.
        example: Real inputs, needed only under STEPGRAPH_CHECK=1.
        groups: The linear maps of the sites that are LOWRANK anywhere, with their factors.
        config: Which passes are wanted.

    Raises:
        CompileError: A FORECAST without coefficients.
    """
    _refuse_bare_forecasts(plan)
    env = read_env()
    if config.exact and env.providers:
        get_logger("ops").warning(
            "exact=True runs the references; STEPGRAPH_PROVIDERS=%s is not asked", ",".join(env.providers)
        )
    written = written_storages(marked.graph)
    index: dict[tuple[Any, ...], int] = {}
    graphs: list[fx.GraphModule] = []
    contexts: list[PassContext] = []
    rows: list[int] = []
    for step, (row, moves) in enumerate(zip(plan.rows, traffic(plan), strict=True)):
        stores = tuple((stored.site, stored.part) for stored in moves.stores)
        forecasts = numbered_forecasts(plan, step)
        key = (row, stores, tuple((i, f.terms, f.per_channel, constant) for i, (f, constant) in sorted(forecasts.items())))
        if key not in index:
            index[key] = len(graphs)
            context = PassContext(plan.sites, row, moves.reads, stores, written, forecasts, groups)
            gm = bound_copy(marked, model)
            check = RowCheck(gm, context, example) if env.check and example else None
            named = {f"variant{len(graphs):03d}": gm}
            run_passes(ROW_PASSES, gm, context, config, named.copy, check, before="marked")
            graphs.append(gm)
            contexts.append(context)
        rows.append(index[key])
    return RowGraphs(tuple(graphs), tuple(contexts), tuple(rows))


def rewrite_program(
    program: RowGraphs,
    plan: CachePlan,
    context: ProgramContext,
    config: CompileConfig,
    example: Example = None,
    constants: Constants = (),
) -> None:
    """Run PROGRAM_PASSES over the rows' graphs, in place.

    Args:
        program: The rows' graphs.
        plan: Their plan.
        context: What the passes see.
        config: Which of them are wanted.
        example: Real inputs, needed only under STEPGRAPH_CHECK=1, as `constants` are.
        constants: Per step and branch, the tensors of the forecasts' coefficients.
    """
    check = None
    if read_env().check and example:
        check = ProgramCheck(program, example, context.results, constants, plan.header.timesteps)
    run_passes(PROGRAM_PASSES, program, context, config, program.named, check)


def _refuse_bare_forecasts(plan: CachePlan) -> None:
    for step, row in enumerate(plan.rows):
        for i, (site, action) in enumerate(zip(plan.sites, row, strict=True)):
            if action == FORECAST and (step, i) not in plan.forecasts:
                raise CompileError(
                    f"step {step}, site {site.name}: FORECAST without coefficients; give the plan some with "
                    f"stepgraph.forecast(plan, ...) (`stepgraph plan correct --forecast`)"
                )
