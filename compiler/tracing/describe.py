"""What a plan's header says of a model, and whether a plan fits a model."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from stepgraph.compiler.models import family_of
from stepgraph.compiler.tracing.mark_sites import MarkedGraph, same_sites
from stepgraph.errors import PlanError
from stepgraph.fingerprint import config_of, dtype_name, fingerprint, model_dtype
from stepgraph.inputs import flat_inputs
from stepgraph.plan import CachePlan, PlanHeader
from stepgraph.scheduler import prepare_scheduler, scheduler_facts
from stepgraph.wrapped_models import unwrapped


def example_inputs(model: nn.Module, batch: int = 1) -> dict[str, Any]:
    """Keyword arguments of the right shapes for a model's forward, on its device and in its dtype; all zeros.

    Raises:
        CompileError: No adapter covers the model's class.
    """
    model = unwrapped(model)
    parameter = next(model.parameters())
    device = torch.device("cpu") if parameter.device.type == "meta" else parameter.device
    return family_of(model).example_inputs(config_of(model), batch, model_dtype(model), device)


def input_shapes(inputs: Mapping[str, Any], unbatched: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensor inputs without the batch dimension, which those named `unbatched` do not have."""
    tensors = {name: value for name, value in flat_inputs(inputs).items() if isinstance(value, torch.Tensor)}
    return {name: tuple(value.shape[name not in unbatched :]) for name, value in tensors.items()}


def branches_of(guidance: str) -> tuple[str, ...]:
    """The model calls within one step."""
    return ("cond", "uncond") if guidance == "separate" else ("all",)


def make_header(model: nn.Module, scheduler: Any, steps: int, marked: MarkedGraph, guidance: str = "batched") -> PlanHeader:
    """The header of a plan for this model under this scheduler."""
    return PlanHeader(
        model=type(model).__name__,
        fingerprint=fingerprint(model),
        steps=steps,
        **scheduler_facts(prepare_scheduler(scheduler, steps)),
        shapes=input_shapes(marked.trace.inputs, marked.family.unbatched),
        dtype=dtype_name(model_dtype(model)),
        macs=marked.macs,
        guidance=guidance,
        branches=branches_of(guidance),
    )


def refuse_other_inputs(plan: CachePlan, inputs: Mapping[str, Any], unbatched: Collection[str] = ()) -> None:
    """Compare inputs with those a plan was made for; only the batch may differ.

    Args:
        plan: The plan.
        inputs: The forward's arguments.
        unbatched: Names of those that have no batch dimension.

    Raises:
        PlanError: An input is missing or new, or its shape or the latents' dtype differs.
    """
    flat = flat_inputs(inputs)
    planned, shapes = plan.header.shapes, input_shapes(flat, unbatched)
    if set(planned) != set(shapes):
        raise PlanError(f"the plan is for the tensor inputs {', '.join(planned)}; given are {', '.join(shapes)}")
    for name, shape in shapes.items():
        if shape != planned[name]:
            sizes = [", ".join([*([] if name in unbatched else ["batch"]), *map(str, s)]) for s in (planned[name], shape)]
            raise PlanError(
                f"the plan is for {name} of shape [{sizes[0]}]; given is [{sizes[1]}]; make a plan for this resolution"
            )
    batched = {name: flat[name] for name in shapes if name not in unbatched}
    latents = next(iter(batched))
    if dtype_name(batched[latents].dtype) != plan.header.dtype:
        raise PlanError(f"the plan is for {plan.header.dtype}; {latents} is {dtype_name(batched[latents].dtype)}")
    empty = [name for name, value in batched.items() if not value.ndim or not value.shape[0]]
    if empty:
        raise PlanError(
            f"the input {empty[0]} has no samples: its shape is {list(batched[empty[0]].shape)}, expected [batch, ...]"
        )
    if len({value.shape[0] for value in batched.values()}) != 1:
        raise PlanError(f"the inputs disagree on the batch size: { {name: v.shape[0] for name, v in batched.items()} }")


def refuse_other_sites(plan: CachePlan, marked: MarkedGraph) -> None:
    """Compare a plan's sites with a model's.

    Raises:
        PlanError: They differ.
    """
    difference = same_sites(plan.sites, marked.sites)
    if difference:
        raise PlanError(difference)
