"""The compiler, top to bottom: a model and a plan in, an executable out."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import fx, nn

from stepgraph.compiler.interfaces.pass_context import PassContext, coefficient_dtype
from stepgraph.compiler.lowering.lower import lower
from stepgraph.compiler.models import family_of
from stepgraph.compiler.passes.fold_sums import fold_sums
from stepgraph.compiler.passes.hoist_conditioning import Inputs, hoist
from stepgraph.compiler.passes.merge_projections import merge_projections
from stepgraph.compiler.passes.split_projections import split_projections
from stepgraph.compiler.specializing.bind_factors import bind_factors
from stepgraph.compiler.specializing.specialize import PASSES, Specialized, dump, numbered_forecasts, specialize
from stepgraph.compiler.tracing.describe import marked_graph, refuse_other_inputs, refuse_other_sites
from stepgraph.compiler.tracing.pause_collector import collector_paused
from stepgraph.config import CompileConfig
from stepgraph.env import get_logger, read_env
from stepgraph.errors import CompileError
from stepgraph.inputs import flat_inputs
from stepgraph.plan import CachePlan
from stepgraph.plan.factors import Factors
from stepgraph.plan.liveness import MAPS
from stepgraph.plan.refuse_other import refuse_other_model
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.memory.layout import kept_dtype, lay_out
from stepgraph.runtime.memory.slots import assign_slots
from stepgraph.runtime.program.packed_linear import packs
from stepgraph.runtime.program.program import Program, Variant, described, refuse_nan, signature
from stepgraph.runtime.program.tables import Hoisted
from stepgraph.runtime.session.compiled import parts_of


def compile_plan(
    model: nn.Module, plan: CachePlan, example_inputs: Mapping[str, Any], config: CompileConfig, factors: Factors | None = None
) -> Executable:
    """Compile a plan for a model (`stepgraph.compile`)."""
    refuse_other_model(plan.header, model)
    if read_env().check:
        refuse_nan(dict(model.named_parameters()), f"weights of {type(model).__name__}")

    def build(inputs: Mapping[str, Any]) -> Program:
        with collector_paused():
            return build_program(model, plan, inputs, config, factors)

    inputs = {name: value for name, value in example_inputs.items() if value is not None and name != "return_dict"}
    program = build(inputs)
    if factors is not None:
        plan = replace(plan, header=program.plan.header, increments=program.plan.increments)
    programs = {signature(inputs): program}
    return Executable(model, plan, config, build, program, parts_of(model), described(inputs), factors, programs)


def build_program(
    model: nn.Module, plan: CachePlan, inputs: Mapping[str, Any], config: CompileConfig, factors: Factors | None = None
) -> Program:
    """All stages for inputs of one signature."""
    clock = _Clock()
    refuse_other_inputs(plan, inputs, family_of(model).unbatched)
    _refuse_other_device(model, inputs)

    # One graph of the whole forward, with a marker on every value that a plan can speak of.
    marked = marked_graph(model, inputs)
    refuse_other_sites(plan, marked)
    # Where two values meet in one projection, each is stored as its own part of the product.
    if not config.exact and split_projections.__name__ not in read_env().disabled_passes:
        marked = split_projections(marked, model, plan)
    # Sizes are measured on this model; a plan file only reports them.
    plan, groups = bind_factors(replace(plan, sites=marked.sites), marked, model, factors)
    clock.stage("trace")

    # One rewritten graph per distinct row: reused values come from slots, and what nothing reads is gone.
    specialized = specialize(marked, model, plan, flat_inputs(inputs), groups, config.exact)
    results, folded = marked.trace.output_spec.num_leaves, frozenset[int]()
    if not config.exact and fold_sums.__name__ not in read_env().disabled_passes:
        specialized, folded = fold_sums(specialized, results)
    slots = assign_slots(plan, folded)
    constants = coefficients_of(plan, factors, next(model.parameters()))
    macs = [specialized.macs(i) for i in range(len(specialized.graphs))]
    clock.stage("specialize")

    # What depends on the prompt or the timestep alone leaves the loop.
    hoisted, tables = hoist_tables(specialized, model, plan, marked.trace.inputs, config)
    clock.stage("hoist")

    # What reads one value in the loop is multiplied with it at once.
    if config.merge and config.packs and merge_projections.__name__ not in read_env().disabled_passes:
        for number, gm in enumerate(specialized.graphs):
            merge_projections(gm, packs)
            dump(gm, read_env(), number, len(PASSES) + 2, merge_projections.__name__)

    # Graphs become code and callables last, when nothing rewrites them any more.
    for gm in specialized.graphs:
        gm.recompile()
    stacks = family_of(model).stacks
    lowered = lower(specialized.graphs, config, lambda path: any(stack.holds(path) for stack in stacks), results)
    variants = tuple(
        Variant(run, gm, context.row, macs[i], providers_of(gm), tables[i])
        for i, (run, gm, context) in enumerate(zip(lowered.runs, specialized.graphs, specialized.contexts, strict=True))
    )
    kept = [tensors_kept(gm, context, results, config.storage) for gm, context in zip(specialized.graphs, specialized.contexts)]
    work = max(run.work_bytes for run in lowered.runs)
    layout = lay_out(slots, [kept[i] for i in specialized.rows], len(plan.header.branches), work, config.offload)
    clock.stage("lower")
    get_logger("pipeline").info("%d variants for %d steps: %s", len(variants), plan.steps, clock.seconds)
    return Program(
        plan=plan,
        input_names=tuple(marked.trace.inputs),
        variants=variants,
        rows=specialized.rows,
        slots=slots,
        folded=folded,
        layout=layout,
        constants=constants,
        results=results,
        output_spec=marked.trace.output_spec,
        batch=marked.batch,
        macs_total=marked.macs * marked.batch,
        seconds=clock.seconds,
        hoisted=hoisted,
        regions=lowered.regions,
        factor_bytes=sum(t.nbytes for site in groups.values() for group in site for t in (*group.a, group.b)),
    )


def hoist_tables(
    specialized: Specialized, model: nn.Module, plan: CachePlan, inputs: Mapping[str, Any], config: CompileConfig
) -> tuple[Hoisted | None, tuple[tuple[int, ...], ...]]:
    """What is computed before the loop, and the tables that each variant takes."""
    if not config.hoist:
        return None, ((),) * len(specialized.graphs)
    limit = None if config.hoist_limit_mb is None else config.hoist_limit_mb * 1e6
    steps = 1 if config.exact else plan.steps
    hoisted, tables = hoist(specialized.graphs, Inputs(tuple(inputs)), steps, family_of(model).timestep, limit)
    for variant, gm in enumerate(specialized.graphs):
        dump(gm, read_env(), variant, len(PASSES) + 1, "hoist")
    return hoisted, tables


def coefficients_of(
    plan: CachePlan, factors: Factors | None, weight: torch.Tensor
) -> tuple[tuple[tuple[torch.Tensor, ...], ...], ...]:
    """Per step and branch, the tensors of the forecasts' coefficients, on the weights' device."""
    dtype, steps = coefficient_dtype(weight.dtype), []
    for step in range(plan.steps):
        used = {number: (i, forecast) for i, (forecast, number) in numbered_forecasts(plan, step).items()}
        branches = []
        for branch in range(len(plan.header.branches)):
            tensors = []
            for _, (i, forecast) in sorted(used.items()):
                affine = factors.affine if factors is not None else {}
                given = affine[f"{plan.sites[i].name}/{step}"] if forecast.per_channel else forecast.coefficients[branch]
                tensors.append(torch.as_tensor(given, dtype=dtype, device=weight.device))
            branches.append(tuple(tensors))
        steps.append(tuple(branches))
    return tuple(steps)


def tensors_kept(
    gm: fx.GraphModule, context: PassContext, results: int, storage: torch.dtype | None
) -> list[list[tuple[torch.Tensor, torch.dtype]]]:
    """Of every value that a variant stores, its tensors and the dtypes they are kept in."""
    (outputs,) = next(iter(reversed(gm.graph.nodes))).args
    rest = iter(outputs[results:])
    kept = []
    for site, part in context.stores:
        count = sum(len(group.maps) + 1 for group in context.groups[site]) if part == MAPS else 1
        values = [node.meta["val"] for node in islice(rest, count)]
        kept.append([(value, kept_dtype(value, part, storage)) for value in values])
    return kept


def providers_of(gm: fx.GraphModule) -> dict[str, int]:
    """The fused operations of a graph and who runs them, with the number of calls."""
    return dict(Counter(node.meta["provider"] for node in gm.graph.nodes if "provider" in node.meta))


def _refuse_other_device(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    device = next(model.parameters()).device
    for name, value in flat_inputs(inputs).items():
        if isinstance(value, torch.Tensor) and value.device != device:
            raise CompileError(f"the model is on {device}, but the input {name} is on {value.device}; move one of them")


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
