"""One static graph per distinct row of a plan."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from stepgraph.compiler.interfaces.pass_context import MapGroup, PassContext, slot_name
from stepgraph.compiler.passes.add_slots import add_slots
from stepgraph.compiler.passes.choose_providers import choose_providers
from stepgraph.compiler.passes.eliminate_dead_code import eliminate_dead_code
from stepgraph.compiler.passes.erase_identities import erase_identities
from stepgraph.compiler.passes.erase_markers import erase_markers
from stepgraph.compiler.passes.fold_constants import fold_constants
from stepgraph.compiler.passes.forecast_site import forecast_site
from stepgraph.compiler.passes.fuse_gated_residual import fuse_gated_residual
from stepgraph.compiler.passes.fuse_lowrank import fuse_lowrank
from stepgraph.compiler.passes.fuse_modulated_norm import fuse_modulated_norm
from stepgraph.compiler.passes.lowrank_site import lowrank_site
from stepgraph.compiler.passes.reuse_site import reuse_site
from stepgraph.compiler.passes.store_site import store_site
from stepgraph.compiler.tracing.graphs import macs_of, written_storages
from stepgraph.compiler.tracing.mark_sites import MarkedGraph
from stepgraph.env import Env, get_logger, read_env
from stepgraph.errors import CompileError
from stepgraph.files.whole_file import whole_file
from stepgraph.ops import lowrank_input
from stepgraph.plan import FORECAST, CachePlan
from stepgraph.plan.corrections import Forecast
from stepgraph.plan.liveness import INPUT, VALUE, traffic

Pass = Callable[[fx.GraphModule, PassContext], int]

# Inputs for stored values come first, in the order in which a session passes them. Values are replaced before any is returned.
# Markers go before dead code does: a residual's marker reads the tokens that go into the stack, which are dead where nobody
# stores the residual. What is left is fused, the neighbours of a low-rank increment after their own parts. Providers are
# chosen last.
PASSES: tuple[Pass, ...] = (
    add_slots, lowrank_site, reuse_site, forecast_site, store_site, erase_markers, eliminate_dead_code,
    erase_identities, fuse_modulated_norm, fuse_gated_residual, fuse_lowrank, fold_constants, choose_providers,
)  # fmt: skip
# `split_projections` runs once, before the rows are rewritten, `fold_sums` behind them, over all rows, and `merge_projections`
# when what is hoisted has left them.
OPTIONAL_PASSES = frozenset((
    "split_projections", "fold_sums", "merge_projections", "eliminate_dead_code", "erase_identities", "fuse_modulated_norm",
    "fuse_gated_residual", "fuse_lowrank", "fold_constants",
))  # fmt: skip


@dataclass(frozen=True)
class Specialized:
    """The graphs of a plan: `rows[step]` is the index of the step's graph and context in `graphs` and `contexts`."""

    graphs: tuple[fx.GraphModule, ...]
    contexts: tuple[PassContext, ...]
    rows: tuple[int, ...]

    def macs(self, variant: int) -> int:
        """Multiply-accumulates of one call of a graph."""
        return macs_of(self.graphs[variant].graph.nodes)


def specialize(
    marked: MarkedGraph,
    model: nn.Module,
    plan: CachePlan,
    example: dict[str, Any] | None = None,
    groups: Mapping[int, tuple[MapGroup, ...]] = MappingProxyType({}),
    exact: bool = True,
) -> Specialized:
    """Rewrite the marked graph once for every distinct (actions, stores, forecasts' terms) of the plan.

    Args:
        marked: The traced graph with its sites.
        model: The model whose weights the graphs use.
        plan: A plan for exactly these sites.
        example: Real inputs, needed only under STEPGRAPH_CHECK=1.
        groups: The linear maps of the sites that are LOWRANK anywhere, with their factors.
        exact: Keep every operation, and run fused ones as their references.

    Raises:
        CompileError: A FORECAST without coefficients.
    """
    for step, row in enumerate(plan.rows):
        for i, (site, action) in enumerate(zip(plan.sites, row, strict=True)):
            if action == FORECAST and (step, i) not in plan.forecasts:
                raise CompileError(
                    f"step {step}, site {site.name}: FORECAST without coefficients; give the plan some with "
                    f"stepgraph.forecast(plan, ...) (`stepgraph plan correct --forecast`)"
                )
    env = read_env()
    unknown = env.disabled_passes - OPTIONAL_PASSES
    if unknown:
        raise CompileError(
            f"STEPGRAPH_DISABLE_PASS names {sorted(unknown)[0]!r}; the passes that can be left out: "
            f"{', '.join(sorted(OPTIONAL_PASSES))}"
        )
    if exact and env.providers:
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
        key = (row, stores, tuple((i, f.terms, f.per_channel, number) for i, (f, number) in sorted(forecasts.items())))
        if key not in index:
            index[key] = len(graphs)
            context = PassContext(plan.sites, row, moves.reads, stores, written, forecasts, groups, exact)
            graphs.append(_rewrite(marked, model, context, len(graphs), env, example))
            contexts.append(context)
        rows.append(index[key])
    return Specialized(tuple(graphs), tuple(contexts), tuple(rows))


def numbered_forecasts(plan: CachePlan, step: int) -> dict[int, tuple[Forecast, int]]:
    """Site index -> its forecast at a step and the number of the constant with its coefficients, counted from 0.

    Equal forecasts share a constant; those with coefficients per channel have one each.
    """
    numbers: dict[Any, int] = {}
    found = {}
    for i in range(len(plan.sites)):
        forecast = plan.forecasts.get((step, i))
        if forecast is not None:
            found[i] = (forecast, numbers.setdefault(i if forecast.per_channel else forecast, len(numbers)))
    return found


def _rewrite(
    marked: MarkedGraph, model: nn.Module, context: PassContext, variant: int, env: Env, example: dict[str, Any] | None
) -> fx.GraphModule:
    """Run the passes over a copy of the marked graph; time and dump each, and under STEPGRAPH_CHECK=1 check each."""
    log = get_logger("passes")
    graph = fx.Graph()
    graph.output(graph.graph_copy(marked.graph, {}))
    gm = marked.trace.bind(model, graph)
    dump(gm, env, variant, 0, "traced")
    example = _random(example) if env.check and example else None
    reference = _run_marked(gm, context, example) if example else None
    for number, rewrite in enumerate(PASSES, start=1):
        name = rewrite.__name__
        if name in env.disabled_passes:
            continue
        started = time.perf_counter()
        count = rewrite(gm, context)
        if env.check:
            gm.graph.lint()
        log.debug("variant %d: %s made %d rewrites in %.1f ms", variant, name, count, 1e3 * (time.perf_counter() - started))
        dump(gm, env, variant, number, name)
        if reference is not None and example is not None:
            _check(gm, context, example, reference, name)
    gm.graph.lint()
    gm.recompile()
    return gm


def dump(gm: fx.GraphModule, env: Env, variant: int, number: int, name: str) -> None:
    """STEPGRAPH_DUMP: write a graph to a file."""
    if env.dump is not None:
        folder = Path(env.dump)
        folder.mkdir(parents=True, exist_ok=True)
        gm.recompile()
        with whole_file(folder / f"variant{variant:03d}-{number:02d}-{name}.py") as partial:
            partial.write_text(gm.print_readable(print_output=False), encoding="utf-8")


@dataclass(frozen=True)
class _Reference:
    """What the unrewritten graph gives on real inputs: its results, the value of every site, and of every node by name."""

    results: tuple[torch.Tensor, ...]
    values: dict[int, torch.Tensor]
    nodes: dict[str, torch.Tensor]


def _random(example: dict[str, Any]) -> dict[str, Any]:
    """Inputs with random numbers in place of what may be zeros: normalised, zeros would be nothing but rounding errors."""
    generator = torch.Generator().manual_seed(0)

    def drawn(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator).to(value.device, value.dtype)

    return {name: drawn(value) for name, value in example.items()}


class _Recorder(fx.Interpreter):
    """Runs a marked graph and keeps the value of every site, and of the nodes `names`."""

    def __init__(self, gm: fx.GraphModule, names: frozenset[str]) -> None:
        super().__init__(gm)
        self.values: dict[int, torch.Tensor] = {}
        self.names, self.nodes = names, dict[str, torch.Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if n.name in self.names:
            self.nodes[n.name] = result.clone()
        if "marker" in n.meta:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            value = arguments[0] - arguments[1] if len(arguments) == 2 else arguments[0]
            self.values[n.meta["marker"]] = value.clone()
        return result


def _run_marked(gm: fx.GraphModule, context: PassContext, example: dict[str, Any]) -> _Reference:
    groups = [group for site in context.groups.values() for group in site]
    recorder = _Recorder(gm, frozenset(name for group in groups for name in (group.input, *group.maps)))
    with torch.no_grad():
        results = recorder.run(*(value for value in example.values() if isinstance(value, torch.Tensor)))
    return _Reference(tuple(results), recorder.values, recorder.nodes)


def _stored(context: PassContext, site: int, part: str, example: dict[str, Any], reference: _Reference) -> list[torch.Tensor]:
    """The tensors of a stored value, as the unrewritten graph gives them."""
    if part == VALUE:
        return [reference.values[site]]
    if part == INPUT:
        return [next(value for value in example.values() if isinstance(value, torch.Tensor))]
    tensors = []
    for group in context.groups[site]:
        tensors += [reference.nodes[name] for name in group.maps]
        tensors.append(lowrank_input.reference(reference.nodes[group.input], group.b))
    return tensors


def _check(gm: fx.GraphModule, context: PassContext, example: dict[str, Any], reference: _Reference, name: str) -> None:
    """STEPGRAPH_CHECK=1: fed values of the unrewritten graph, the rewritten one gives the same results and shapes.

    Forecasts take their last stored value here, which is the value itself.
    """
    gm.recompile()
    present = {node.target: node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"}
    given = {key: value for key, value in example.items() if isinstance(value, torch.Tensor)}
    for read in context.reads:
        for number, tensor in enumerate(_stored(context, read.site, read.part, example, reference)):
            given[slot_name(context.sites[read.site], read.part, read.age, number)] = tensor.clone()
    for key, value in present.items():
        if str(key).startswith("coefficients_"):
            given[key] = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            given[key][0] = 1
    with torch.no_grad():
        outputs = gm(**{k: v for k, v in given.items() if k in present})
    wanted = list(reference.results)
    for site, part in context.stores:
        wanted += _stored(context, site, part, example, reference)
    for number, (value, expected) in enumerate(zip(outputs, wanted, strict=False)):
        error = torch.tensor(torch.inf)
        if value.shape == expected.shape:
            error = (value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
        tolerance = 1e-5 if value.dtype in (torch.float32, torch.float64) else 3e-2
        if value.shape != expected.shape or value.dtype != expected.dtype or not error <= tolerance:
            raise CompileError(
                f"pass {name} changed output {number}: {tuple(value.shape)} {value.dtype}, relative error "
                f"{float(error):.2e}; expected {tuple(expected.shape)} {expected.dtype} (STEPGRAPH_CHECK)"
            )
