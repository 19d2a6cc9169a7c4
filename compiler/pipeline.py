"""The compiler, top to bottom: a model and a plan in, an executable out."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import fx, nn

from stepgraph.adapters import settle
from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.compiler.interfaces.program_context import ProgramContext
from stepgraph.compiler.lowering.lower import lower
from stepgraph.compiler.marking.describe import refuse_other_inputs, refuse_other_sites
from stepgraph.compiler.marking.graphs import macs_of
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.specializing.bind_factors import bind_factors
from stepgraph.compiler.specializing.coefficients import coefficients_of
from stepgraph.compiler.specializing.specialize import rewrite_model, rewrite_program, specialize
from stepgraph.compiler.tracing.pause_garbage_collector import pause_garbage_collector
from stepgraph.compiler.tracing.table_rows import table_rows
from stepgraph.config import CompileConfig
from stepgraph.env import get_logger
from stepgraph.errors import CompileError
from stepgraph.fingerprint import model_dtype
from stepgraph.inputs import flat_inputs, refuse_odd_tensors
from stepgraph.node_facts import PROVIDER, output_of
from stepgraph.packed_weights import forget_packed
from stepgraph.plan import CachePlan
from stepgraph.plan.factors import Factors
from stepgraph.plan.header import NOTHING
from stepgraph.plan.liveness import MAPS
from stepgraph.plan.measured import measured, refuse_other_values
from stepgraph.plan.refuse_other import follow_model
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.memory.layout import kept_dtype, lay_out
from stepgraph.runtime.memory.slots import assign_slots
from stepgraph.runtime.program.bound_weights import BoundWeights
from stepgraph.runtime.program.facts import Facts
from stepgraph.runtime.program.packed_linear import packs
from stepgraph.runtime.program.program import Program, Variant, described, refuse_nan_weights, signature
from stepgraph.runtime.program.stated_facts import other_facts_of_plan
from stepgraph.runtime.session.follow_weights import watch_tensors
from stepgraph.schedule import TimestepInput
from stepgraph.wrapped_models import unwrapped


def compile_plan(
    model: nn.Module,
    plan: CachePlan,
    example_inputs: Mapping[str, Any],
    config: CompileConfig,
    factors: Factors | None = None,
    traced: TracedModel | None = None,
) -> Executable:
    """Compile a plan for a model (`stepgraph.compile`); `traced` hands on graphs that were made of this very model before."""
    model = unwrapped(model)
    settle(model)
    warning = follow_model(plan, model, config.strict)
    if warning:
        get_logger("weights").warning("%s", warning)
    refuse_nan_weights(model)
    # What another executable has packed of this model may be older than the last write through `.data`.
    weights = BoundWeights(model)
    forget_packed(weights.tensors)
    weights.warned = bool(warning)
    # For the rest of a plan (image to image) the graph at hand is specialised anew.
    graphs = TracedModel.of(model, traced)
    if plan.header.timestep is None:
        plan = plan.with_header(timestep=graphs.family.timestep)

    def tell(difference: str) -> None:
        if difference and not weights.warned:
            get_logger("weights").warning("%s", difference)
            weights.warned = True

    def build(model: nn.Module, inputs: Mapping[str, Any], plan: CachePlan) -> Program:
        with pause_garbage_collector():
            return build_program(TracedModel.of(model, graphs), plan, inputs, config, factors, tell)

    inputs = {name: value for name, value in example_inputs.items() if value is not None and name != "return_dict"}
    inputs = graphs.ordered(inputs)
    program = build(model, inputs, plan)
    if factors is not None:
        plan = replace(plan, header=program.plan.header, increments=program.plan.increments)
    programs = {signature(inputs): program}
    executable = Executable(model, plan, config, build, weights, program, described(inputs), factors, programs)
    watch_tensors(executable, program)
    return executable


def build_program(
    traced: TracedModel,
    plan: CachePlan,
    inputs: Mapping[str, Any],
    config: CompileConfig,
    factors: Factors | None,
    tell: Callable[[str], None],
) -> Program:
    """All stages for inputs of one signature; `tell` gets what differs from what the plan was made under, if anything does."""
    clock, model = _StageClock(), traced.model
    refuse_odd_tensors(inputs)
    refuse_other_inputs(plan, inputs, traced.unbatched(inputs, plan.header.shapes))
    _refuse_other_device(model, inputs)

    # One graph of the whole forward, with a marker on every value that a plan can speak of.
    marked = traced.marked(inputs)
    refuse_other_sites(plan, marked)
    tell(_follow_facts(plan, marked.trace.facts, config))
    # What the plan stores of some values becomes another value there.
    example = flat_inputs(inputs)
    marked = rewrite_model(marked, model, plan, config, example)
    # Sizes are measured on this model; a plan file only reports them.
    plan, groups = bind_factors(replace(plan, sites=marked.sites), marked, model, factors)
    clock.stage("trace")

    # One rewritten graph per distinct row: reused values come from slots, and what nothing reads is gone.
    rows = specialize(marked, model, plan, example, groups, config)
    constants = coefficients_of(plan, factors, next(model.parameters()).device, model_dtype(model))
    macs = [macs_of(gm.graph.nodes) for gm in rows.graphs]
    clock.stage("specialize")

    # Over all rows: what is only added up is one stored sum, what depends on the prompt or the timestep alone leaves the loop.
    results = marked.trace.output_spec.num_leaves
    family = marked.family
    timestep = plan.header.timestep or family.timestep or TimestepInput()
    context = ProgramContext(tuple(marked.trace.inputs), results, plan.steps, config, timestep, packs)
    rewrite_program(rows, plan, context, config, example, constants)
    slots = assign_slots(plan, rows.folded)
    clock.stage("hoist")

    # Graphs become callables last, when nothing rewrites them any more.
    lowered = lower(rows.graphs, config, family.holds_block, results)
    variants = tuple(
        Variant(run, gm, row_context.row, macs[i], providers_of(gm), rows.tables[i])
        for i, (run, gm, row_context) in enumerate(zip(lowered.runs, rows.graphs, rows.contexts, strict=True))
    )
    stored = [tensors_stored(gm, row_context, results, config.storage) for gm, row_context in zip(rows.graphs, rows.contexts)]
    work = max(run.work_bytes for run in lowered.runs)
    layout = lay_out(slots, [stored[i] for i in rows.rows], len(plan.header.branches), work, config.offload)
    clock.stage("lower")
    get_logger("pipeline").info("%d variants for %d steps: %s", len(variants), plan.steps, clock.seconds)
    return Program(
        plan=plan,
        input_names=tuple(marked.trace.inputs),
        variants=variants,
        rows=rows.rows,
        slots=slots,
        folded=rows.folded,
        layout=layout,
        constants=constants,
        results=results,
        output_spec=marked.trace.output_spec,
        batch=marked.batch,
        macs_total=marked.macs * marked.batch,
        seconds=clock.seconds,
        hoisted=rows.hoisted,
        regions=lowered.regions,
        facts=marked.trace.facts,
        tensors=tuple(marked.trace.tensors.values()),
        table_rows=table_rows(marked.trace.graph, model),
        factor_bytes=sum(t.nbytes for site in groups.values() for group in site for t in (*group.a, group.b)),
    )


def tensors_stored(
    gm: fx.GraphModule, context: PassContext, results: int, storage: torch.dtype | None
) -> list[list[tuple[torch.Tensor, torch.dtype]]]:
    """Of every value that a variant stores, its tensors and the dtypes they are kept in."""
    (outputs,) = output_of(gm.graph).args
    rest = iter(outputs[results:])
    stored = []
    for site, part in context.stores:
        count = sum(len(group.maps) + 1 for group in context.groups[site]) if part == MAPS else 1
        values = [node.meta["val"] for node in islice(rest, count)]
        stored.append([(value, kept_dtype(value, part, storage)) for value in values])
    return stored


def providers_of(gm: fx.GraphModule) -> dict[str, int]:
    """The fused operations of a graph and who runs them, with the number of calls."""
    return dict(Counter(str(node.meta[PROVIDER]) for node in gm.graph.nodes if PROVIDER in node.meta))


def _follow_facts(plan: CachePlan, facts: Facts, config: CompileConfig) -> str:
    """Compare what a forward reads with what the plan was made under; it counts like the values of weights.

    Returns:
        What the user should be told, once (`stepgraph.plan.measured.refuse_other_values`).

    Raises:
        MismatchError: Something differs, and the plan measured what does not follow.
    """
    if measured(plan) == NOTHING:
        return ""
    difference = other_facts_of_plan(plan.header.facts, facts)
    return refuse_other_values(plan, difference, config.strict) if difference else ""


def _refuse_other_device(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    device = next(model.parameters()).device
    for name, value in flat_inputs(inputs).items():
        if isinstance(value, torch.Tensor) and value.device != device:
            raise CompileError(f"the model is on {device}, but the input {name} is on {value.device}; move one of them")


class _StageClock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
