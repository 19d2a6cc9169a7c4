"""The compiler, top to bottom: a model and a plan in, an executable out."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stepgraph.compiler.describe import marked_graph, refuse_other_inputs, refuse_other_sites
from stepgraph.compiler.lower import lower
from stepgraph.compiler.models import family_of
from stepgraph.compiler.specialize import specialize
from stepgraph.config import CompileConfig, CompileError
from stepgraph.env import get_logger, read_env
from stepgraph.fingerprint import refuse_other_model
from stepgraph.plan import CachePlan
from stepgraph.runtime.executable import Executable, Program, Variant, parts_of, refuse_nan, signature
from stepgraph.runtime.slots import assign_slots


def compile_plan(model: nn.Module, plan: CachePlan, example_inputs: Mapping[str, Any], config: CompileConfig) -> Executable:
    """Compile a plan for a model (`stepgraph.compile`)."""
    refuse_other_model(plan.header, model)
    if read_env().check:
        refuse_nan(dict(model.named_parameters()), f"weights of {type(model).__name__}")

    def build(inputs: Mapping[str, Any]) -> Program:
        return build_program(model, plan, inputs, config)

    inputs = {name: value for name, value in example_inputs.items() if value is not None and name != "return_dict"}
    program = build(inputs)
    return Executable(model, plan, config, build, program, parts_of(model), {signature(inputs): program})


def build_program(model: nn.Module, plan: CachePlan, inputs: Mapping[str, Any], config: CompileConfig) -> Program:
    """All stages for inputs of one signature."""
    clock = _Clock()
    refuse_other_inputs(plan, inputs, family_of(model).unbatched)
    _refuse_other_device(model, inputs)

    # One graph of the whole forward, with a marker on every value that a plan can speak of.
    marked = marked_graph(model, inputs)
    refuse_other_sites(plan, marked)
    # Sizes are measured on this model; a plan file only reports them.
    plan = replace(plan, sites=marked.sites)
    clock.stage("trace")

    # One rewritten graph per distinct row: reused values come from slots, and what nothing reads is gone.
    specialized = specialize(marked, model, plan, dict(inputs))
    slots = assign_slots(plan)
    clock.stage("specialize")

    # Graphs become callables last, when nothing rewrites them any more.
    variants = tuple(
        Variant(lower(gm, config), gm, context.row, specialized.macs(i))
        for i, (gm, context) in enumerate(zip(specialized.graphs, specialized.contexts, strict=True))
    )
    clock.stage("lower")
    get_logger("pipeline").info("%d variants for %d steps: %s", len(variants), plan.steps, clock.seconds)
    return Program(
        input_names=tuple(marked.trace.inputs),
        variants=variants,
        rows=specialized.rows,
        slots=slots,
        results=marked.trace.output_spec.num_leaves,
        output_spec=marked.trace.output_spec,
        batch=marked.batch,
        macs_total=marked.macs * marked.batch,
        seconds=clock.seconds,
    )


def _refuse_other_device(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    device = next(model.parameters()).device
    for name, value in inputs.items():
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
