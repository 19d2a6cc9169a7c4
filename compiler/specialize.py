"""One static graph per distinct row of a plan."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from stepgraph.compiler.graphs import macs_of, written_storages
from stepgraph.compiler.passes.context import PassContext, slot_name
from stepgraph.compiler.passes.eliminate_dead_code import eliminate_dead_code
from stepgraph.compiler.passes.erase_markers import erase_markers
from stepgraph.compiler.passes.reuse_site import reuse_site
from stepgraph.compiler.passes.store_site import store_site
from stepgraph.compiler.sites import MarkedGraph
from stepgraph.config import CompileError
from stepgraph.env import Env, get_logger, read_env
from stepgraph.files import whole_file
from stepgraph.liveness import traffic
from stepgraph.plan import FORECAST, LOWRANK, Action, CachePlan

Pass = Callable[[fx.GraphModule, PassContext], int]

# Values are replaced and returned first. Markers go before dead code does: a residual's marker reads the tokens that go into
# the stack, which are dead where nobody stores the residual.
PASSES: tuple[Pass, ...] = (reuse_site, store_site, erase_markers, eliminate_dead_code)
OPTIONAL_PASSES = frozenset({"eliminate_dead_code"})


@dataclass(frozen=True)
class Specialized:
    """The graphs of a plan: `rows[step]` is the index of the step's graph and context in `graphs` and `contexts`."""

    graphs: tuple[fx.GraphModule, ...]
    contexts: tuple[PassContext, ...]
    rows: tuple[int, ...]

    def macs(self, variant: int) -> int:
        """Multiply-accumulates of one call of a graph."""
        return macs_of(self.graphs[variant].graph.nodes)


def specialize(marked: MarkedGraph, model: nn.Module, plan: CachePlan, example: dict[str, Any] | None = None) -> Specialized:
    """Rewrite the marked graph once for every distinct (actions, stores) of the plan.

    Args:
        marked: The traced graph with its sites.
        model: The model whose weights the graphs use.
        plan: A plan for exactly these sites.
        example: Real inputs, needed only under STEPGRAPH_CHECK=1.

    Raises:
        CompileError: The plan has an action that this version does not compile.
    """
    for step, row in enumerate(plan.rows):
        for site, action in zip(plan.sites, row, strict=True):
            if action in (LOWRANK, FORECAST):
                raise CompileError(
                    f"step {step}, site {site.name}: {Action(action).name} is part of the plan format, but this "
                    f"version compiles COMPUTE and REUSE only"
                )
    env = read_env()
    unknown = env.disabled_passes - OPTIONAL_PASSES
    if unknown:
        raise CompileError(
            f"STEPGRAPH_DISABLE_PASS names {sorted(unknown)[0]!r}; the passes that can be left out: "
            f"{', '.join(OPTIONAL_PASSES)}"
        )
    written = written_storages(marked.graph)
    index: dict[tuple[str, tuple[int, ...]], int] = {}
    graphs: list[fx.GraphModule] = []
    contexts: list[PassContext] = []
    rows: list[int] = []
    for row, moves in zip(plan.rows, traffic(plan), strict=True):
        key = (row, moves.stores)
        if key not in index:
            index[key] = len(graphs)
            context = PassContext(plan.sites, row, moves.reads, moves.stores, written)
            graphs.append(_rewrite(marked, model, context, len(graphs), env, example))
            contexts.append(context)
        rows.append(index[key])
    return Specialized(tuple(graphs), tuple(contexts), tuple(rows))


def _rewrite(
    marked: MarkedGraph, model: nn.Module, context: PassContext, variant: int, env: Env, example: dict[str, Any] | None
) -> fx.GraphModule:
    """Run the passes over a copy of the marked graph; time, lint, dump and check each."""
    log = get_logger("passes")
    graph = fx.Graph()
    graph.output(graph.graph_copy(marked.graph, {}))
    gm = marked.trace.bind(model, graph)
    _dump(gm, env, variant, 0, "traced")
    reference = _run_marked(gm, context, example) if env.check and example else None
    for number, rewrite in enumerate(PASSES, start=1):
        name = rewrite.__name__
        if name in env.disabled_passes:
            continue
        started = time.perf_counter()
        count = rewrite(gm, context)
        gm.graph.lint()
        log.debug("variant %d: %s made %d rewrites in %.1f ms", variant, name, count, 1e3 * (time.perf_counter() - started))
        _dump(gm, env, variant, number, name)
        if reference is not None and example is not None:
            _check(gm, context, example, reference, name)
    gm.recompile()
    return gm


def _dump(gm: fx.GraphModule, env: Env, variant: int, number: int, name: str) -> None:
    if env.dump is not None:
        folder = Path(env.dump)
        folder.mkdir(parents=True, exist_ok=True)
        gm.recompile()
        with whole_file(folder / f"variant{variant:03d}-{number:02d}-{name}.py") as partial:
            partial.write_text(gm.print_readable(print_output=False), encoding="utf-8")


@dataclass(frozen=True)
class _Reference:
    """What the unrewritten graph gives on real inputs: its results, and the value of every site."""

    results: tuple[torch.Tensor, ...]
    values: dict[int, torch.Tensor]


class _Recorder(fx.Interpreter):
    """Runs a marked graph and keeps the value of every site."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[int, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if "marker" in n.meta:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            value = arguments[0] - arguments[1] if len(arguments) == 2 else arguments[0]
            self.values[n.meta["marker"]] = value.clone()
        return result


def _run_marked(gm: fx.GraphModule, context: PassContext, example: dict[str, Any]) -> _Reference:
    recorder = _Recorder(gm)
    with torch.no_grad():
        results = recorder.run(*(value for value in example.values() if isinstance(value, torch.Tensor)))
    return _Reference(tuple(results), recorder.values)


def _check(gm: fx.GraphModule, context: PassContext, example: dict[str, Any], reference: _Reference, name: str) -> None:
    """STEPGRAPH_CHECK=1: fed values of the unrewritten graph, the rewritten one gives the same results and shapes."""
    gm.recompile()
    present = {node.target for node in gm.graph.nodes if node.op == "placeholder"}
    slots = {slot_name(context.sites[i]): reference.values[i].clone() for i in context.reads}
    inputs = {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        outputs = gm(**{k: v for k, v in (inputs | slots).items() if k in present})
    wanted = list(reference.results) + [reference.values[i] for i in context.stores]
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
