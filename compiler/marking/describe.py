"""What a plan's header says of a model, and whether a plan fits a model."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stepgraph.checked import checked
from stepgraph.checks import MOST_ROWS, check_whole, shown
from stepgraph.compiler.interfaces.family import Family
from stepgraph.compiler.marking.mark_sites import MarkedGraph, same_sites
from stepgraph.compiler.models import family_of
from stepgraph.errors import ArgumentError, CompileError, PlanError
from stepgraph.fingerprint import adapters_hash, config_of, dtype_name, fingerprint, has_data, model_dtype
from stepgraph.inputs import POSITIONS, flat_inputs, latents_key, latents_of, like_flat, refuse_odd_tensors
from stepgraph.plan import CachePlan, PlanHeader
from stepgraph.plan.measured import rests_on_measurement
from stepgraph.runtime.program.stated_facts import facts_of_plan
from stepgraph.schedule import Schedule
from stepgraph.scheduler import prepare_scheduler, scheduler_facts, shifted
from stepgraph.wrapped_models import unwrapped


@checked
def example_inputs(model: nn.Module, batch: int = 1, conditioning: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of the right shapes for a model's forward, on its device and in its dtype.

    Args:
        model: The model.
        batch: Rows of every input.
        conditioning: What the model will be conditioned on, as for `stepgraph.sample`: the inputs have its shapes and dtypes
            (text tokens, masks, positions). The family's usual sizes unless given.

    Raises:
        CompileError: No adapter covers the model's class, or the model has no parameters.
        ArgumentError: The conditioning lacks an input of the model, has one that it does not take, or is no tensor.
    """
    model = unwrapped(model)
    return inputs_for(model, family_of(model), batch, conditioning)


def inputs_for(
    model: nn.Module, family: Family, batch: int = 1, conditioning: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`example_inputs`, of a model whose family is known."""
    check_whole("batch", batch, 1, MOST_ROWS)
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise CompileError(f"{type(model).__name__} has no parameters; expected a model with its weights")
    device = torch.device("cpu") if parameter.device.type == "meta" else parameter.device
    usual = family.example_inputs(config_of(model), batch, model_dtype(model), device)
    if conditioning is None:
        return usual
    cond = complete_conditioning(model, family, conditioning)
    inputs = {name: value for name, value in usual.items() if name in own_inputs(usual) or name in cond}
    for name, value in cond.items():
        inputs[name] = _like(value, batch, name not in family.unbatched, device, name)
    latents = latents_key(inputs)
    if "img_ids" in inputs and inputs["img_ids"].shape[0] != inputs[latents].shape[1]:
        inputs[latents] = inputs[latents].new_zeros(batch, inputs["img_ids"].shape[0], inputs[latents].shape[2])
    return inputs


def planned_inputs(model: nn.Module, family: Family, header: PlanHeader, batch: int = 1) -> dict[str, Any]:
    """The same, in the sizes of a plan's header: zeros, and masks that leave nothing out."""
    usual = inputs_for(model, family, batch)
    flat = {name: value for name, value in flat_inputs(usual).items() if isinstance(value, torch.Tensor)}
    other: dict[str, Any] = {}
    for name in set(flat) & set(header.shapes):
        shape = (*(() if name in family.unbatched else (batch,)), *header.shapes[name])
        if shape != tuple(flat[name].shape):
            other[name] = flat[name].new_full(shape, int("mask" in name))
    inputs = like_flat(usual, other)
    return {name: value for name, value in inputs.items() if name not in flat or name in header.shapes}


def own_inputs(inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The inputs that the sampler makes: the latents, which come first, and the timestep."""
    return latents_key(inputs), "timestep"


def complete_conditioning(
    model: nn.Module, family: Family, conditioning: Mapping[str, Any], tokens: int | None = None
) -> dict[str, Any]:
    """The conditional inputs by name, with what pipelines of the model's family make themselves.

    Args:
        model: The model.
        family: Its family.
        conditioning: As a caller has it.
        tokens: How many the image has; as usual unless given.

    Raises:
        ArgumentError: An input of the model is missing, or is none of its inputs, or is sparse.
    """
    cond = {name: value for name, value in conditioning.items() if not name.startswith("negative_") and value is not None}
    refuse_odd_tensors(cond)
    if family.completed is not None:
        cond = family.completed(cond, tokens)
    parameters = [name for name in inspect.signature(type(model).forward).parameters if name not in ("self", "return_dict")]
    # What a class without an adapter needs is in the example inputs that it is traced with.
    usual: Mapping[str, Any] = dict.fromkeys(parameters[:1])
    if not family.found:
        usual = family.example_inputs(config_of(model), 1, model_dtype(model), torch.device("meta"))
    takes = {*usual, *parameters}
    expected = [name for name in usual if name not in own_inputs(usual)]
    for name in cond:
        if name not in takes or name in own_inputs(usual):
            raise ArgumentError(
                f"conditioning has {name}, which {type(model).__name__} is not conditioned on; {_takes(expected)}"
            )
    for name in expected:
        if name not in cond and name not in family.optional:
            raise ArgumentError(f"conditioning lacks {name}, which {type(model).__name__} needs; {_takes(expected)}")
    return cond


def _takes(expected: Sequence[str]) -> str:
    return f"expected are {', '.join(expected) or 'none'}"


def _like(value: Any, batch: int, batched: bool, device: torch.device, name: str) -> Any:
    """Conditioning as an example of another batch size; masks and positions keep their values as far as rows go."""
    if isinstance(value, Mapping):
        return {key: _like(entry, batch, batched, device, f"{name}.{key}") for key, entry in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if not has_data(value):
        raise ArgumentError(f"conditioning {name} is {shown(value)} on {value.device}; expected a tensor that holds values")
    if not batched:
        return value.to(device)
    if not value.ndim or not value.shape[0]:
        raise ArgumentError(f"conditioning {name} is {list(value.shape)}; expected one row per sample")
    return value[:1].to(device).expand(batch, *value.shape[1:]).contiguous()


def input_shapes(inputs: Mapping[str, Any], unbatched: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensor inputs without the batch dimension, which those named `unbatched` do not have."""
    tensors = {name: value for name, value in flat_inputs(inputs).items() if isinstance(value, torch.Tensor)}
    return {name: tuple(value.shape[name not in unbatched :]) for name, value in tensors.items()}


def unbatched_of(inputs: Mapping[str, Any], planned: Mapping[str, tuple[int, ...]] | None = None) -> frozenset[str]:
    """Names of the tensor inputs that have no batch dimension, where no adapter says so.

    A plan says it by its shapes, which are without the batch. Else these are they whose first dimension is not the latents',
    and all where the latents are a list, one entry for each sample.

    Args:
        inputs: The forward's arguments, the latents first.
        planned: The shapes of a plan's header.
    """
    tensors = {name: value for name, value in flat_inputs(inputs).items() if isinstance(value, torch.Tensor)}
    if planned is not None:
        return frozenset(name for name, value in tensors.items() if value.ndim == len(planned.get(name, ())))
    latents = latents_of(inputs)
    batch = latents.shape[0] if isinstance(latents, torch.Tensor) and latents.ndim else None
    return frozenset(
        name
        for name, value in tensors.items()
        if not value.ndim or value.shape[0] != batch or (name in POSITIONS and value.ndim == 2)
    )


def latents_first(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments in the order in which the model's forward takes them, as pipelines give them by name in any order."""
    order = list(inspect.signature(type(model).forward).parameters)
    return dict(sorted(inputs.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def branches_of(guidance: str) -> tuple[str, ...]:
    """The model calls within one step."""
    return ("cond", "uncond") if guidance == "separate" else ("all",)


def make_header(
    model: nn.Module,
    scheduler: Any,
    steps: int,
    marked: MarkedGraph,
    guidance: str = "batched",
    schedule: Schedule | None = None,
) -> PlanHeader:
    """The header of a plan for this model under this scheduler.

    Raises:
        PlanError: The scheduler cannot be set so.
    """
    shapes = input_shapes(marked.trace.inputs, marked.family.unbatched)
    schedule = shifted(schedule or Schedule(), scheduler, latents_shape(marked.trace.inputs), model)
    return PlanHeader(
        model=type(model).__name__,
        fingerprint=fingerprint(model),
        steps=steps,
        **scheduler_facts(prepare_scheduler(scheduler, steps, schedule=schedule), schedule.begin),
        shapes=shapes,
        dtype=dtype_name(model_dtype(model)),
        macs=marked.macs,
        guidance=guidance,
        branches=branches_of(guidance),
        schedule=schedule,
        timestep=marked.family.timestep,
        adapters=adapters_hash(model).replace("-", ""),
        facts=facts_of_plan(marked.trace.facts),
    )


def latents_shape(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the latents, the first of a model's inputs, without their batch."""
    return tuple(latents_of(inputs).shape[1:])


def refuse_other_inputs(plan: CachePlan, inputs: Mapping[str, Any], unbatched: Collection[str] = ()) -> None:
    """Compare inputs with those a plan was made for.

    Only the batch may differ; a plan that rests on no measurement follows inputs of other sizes too.

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
        missing = [f"{name} is missing" for name in planned if name not in shapes]
        more = [f"{name} is not among them" for name in shapes if name not in planned]
        raise PlanError(
            f"the plan is for the tensor inputs {', '.join(planned)}; given are {', '.join(shapes) or 'none'}: "
            f"{', '.join(missing + more)}; pass just these, or make a plan with example_inputs= as it will be called"
        )
    batched = {name: flat[name] for name in shapes if name not in unbatched}
    latents = latents_key(shapes)
    for name, shape in shapes.items():
        what = _what_differs(name, name in (latents, "img_ids"), planned[name], shape)
        if what == "shape" or (what and rests_on_measurement(plan)):
            sizes = [", ".join([*([] if name in unbatched else ["batch"]), *map(str, s)]) for s in (planned[name], shape)]
            measuring = ", measured with conditioning= of these shapes" if what == "number of tokens" else ""
            raise PlanError(
                f"the plan is for {name} of shape [{sizes[0]}]; given is [{sizes[1]}]; make a plan for this {what}{measuring}"
            )
    if dtype_name(flat[latents].dtype) != plan.header.dtype:
        raise PlanError(f"the plan is for {plan.header.dtype}; {latents} is {dtype_name(flat[latents].dtype)}")
    empty = [name for name, value in batched.items() if not value.ndim or not value.shape[0]]
    if empty:
        raise PlanError(
            f"the input {empty[0]} has no samples: its shape is {list(batched[empty[0]].shape)}, expected [batch, ...]"
        )
    if len({value.shape[0] for value in batched.values()}) > 1:
        rows = {name: value.shape[0] for name, value in batched.items()}
        raise PlanError(
            f"the inputs disagree on the batch size: {rows}; a graph is made for one size and repeats no row: give every "
            f"input as many, such as by .expand({max(rows.values())}, ...)"
        )


def _what_differs(name: str, image: bool, planned: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What of an input is of another size than planned: the resolution or the number of tokens, which models take in any size,
    or else its shape; empty where nothing is.
    """
    if planned == shape:
        return ""
    # Latents [C, H, W] keep their first size; tokens [N, C], positions [N, 3] and text [N, D] their last; masks [N] have one.
    fixed = [s[0] if image and len(s) == 3 else s[-1] if len(s) == 2 else None for s in (planned, shape)]
    free = (image or name.startswith(("encoder_", "txt_"))) and len(planned) == len(shape) and len(shape) > 0
    if not free or fixed[0] != fixed[1]:
        return "shape"
    return "resolution" if image else "number of tokens"


def refuse_other_sites(plan: CachePlan, marked: MarkedGraph) -> None:
    """Compare a plan's sites with a model's.

    Raises:
        PlanError: They differ.
    """
    difference = same_sites(plan.sites, marked.sites)
    if difference:
        raise PlanError(difference)
