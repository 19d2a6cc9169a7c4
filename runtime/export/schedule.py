"""The schedule table of an export: what every step runs, reads, stores and frees, and what the sampler does with it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepgraph.errors import CompileError
from stepgraph.fingerprint import dtype_name, fingerprint
from stepgraph.inputs import latents_of
from stepgraph.plan.refuse_other import refuse_other_schedule
from stepgraph.runtime.export.weight_names import WeightNames
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.sampling.linear_steps import linear_steps
from stepgraph.runtime.session.compiled import Compiled
from stepgraph.schedule import TimestepInput
from stepgraph.scheduler import prepare_scheduler, step_arguments


def inputs_of(program: Program) -> dict[str, torch.Tensor]:
    """The tensor inputs of a program by name, without data."""
    placeholders = program.variants[0].graph.graph.find_nodes(op="placeholder")
    return {name: node.meta["val"] for name, node in zip(program.input_names, placeholders, strict=False)}


def make_schedule(executable: Compiled, program: Program, names: WeightNames, scheduler: Any) -> dict[str, Any]:
    """Everything but the programs, as plain data.

    Args:
        executable: What is exported.
        program: Of it.
        names: Names of the weights; the forecasts' coefficients are added.
        scheduler: The sampler, or None.

    Raises:
        CompileError: The program takes whole timesteps and the plan has others.
        PlanError: The scheduler is not the one that the plan was made for.
    """
    header, inputs = executable.plan.header, inputs_of(program)
    latents = latents_of(inputs)
    # Made where the model runs, for the bits.
    timesteps = torch.tensor(header.timesteps, device=latents.device)
    model_timesteps = (header.timestep or TimestepInput())(timesteps, latents.dtype).tolist()
    _refuse_broken_timesteps(inputs, model_timesteps)
    return {
        "model": header.model,
        "fingerprint": fingerprint(executable.model),
        "policy": header.policy,
        "scheduler": header.scheduler,
        "guidance": header.guidance,
        "branches": list(header.branches),
        "batch": program.batch,
        "device": str(latents.device),
        "inputs": [
            {"name": name, "shape": list(value.shape), "dtype": dtype_name(value.dtype)} for name, value in inputs.items()
        ],
        "results": program.results,
        "sites": [site.name for site in program.plan.sites],
        "variants": [
            {"program": variant_name(i), "row": v.row, "stores": stored_counts(program, i), "tables": list(v.tables)}
            for i, v in enumerate(program.variants)
        ],
        "steps": [
            {**_step(program, names, step), "timestep": timestep, "model_timestep": model_timestep}
            for step, (timestep, model_timestep) in enumerate(zip(header.timesteps, model_timesteps, strict=True))
        ],
        "sampler": _sampler(executable, scheduler),
    }


def variant_name(number: int) -> str:
    """The name of a variant's program and files."""
    return f"variant-{number:03d}"


def stored_counts(program: Program, variant: int) -> list[int]:
    """How many tensors each value has that a variant stores."""
    first, *_ = program.layout.steps[program.rows.index(variant)]
    return [len(places) for places in first.stores]


def _step(program: Program, names: WeightNames, step: int) -> dict[str, Any]:
    slots = program.slots.steps[step]
    return {
        "variant": program.rows[step],
        "reads": list(slots.reads),
        "stores": list(slots.stores),
        "frees": list(slots.frees),
        "constants": [[names.name(tensor, "coefficients") for tensor in branch] for branch in program.constants[step]],
    }


def _refuse_broken_timesteps(inputs: Mapping[str, torch.Tensor], timesteps: Sequence[float]) -> None:
    if "timestep" not in inputs:
        raise CompileError(f"an export has one input called timestep; this model's are {', '.join(inputs)}")
    broken = [t for t in timesteps if t != int(t)]
    dtype = inputs["timestep"].dtype
    if broken and not dtype.is_floating_point:
        raise CompileError(
            f"the plan has the timestep {broken[0]:g}, but the executable was compiled for timesteps of {dtype_name(dtype)}; "
            f"pass inputs with a timestep of float32"
        )


def _sampler(executable: Compiled, scheduler: Any) -> dict[str, Any]:
    """The sampler's steps as fixed linear combinations, or the reason why they are not there."""
    if scheduler is None:
        return {"reason": "none was given to the export"}
    header = executable.plan.header
    prepared = prepare_scheduler(scheduler, header.steps, schedule=header.schedule)
    refuse_other_schedule(header, prepared, "the scheduler of this export")
    combinations = linear_steps(prepared, step_arguments(prepared), header.schedule.begin)
    if isinstance(combinations, str):
        return {"reason": combinations}
    terms = [[[term.age, int(term.output), term.weight] for term in terms] for terms in combinations.terms]
    # Flow-matching schedulers scale nothing, and a run that begins later is given its latents as they are.
    sigma = 1.0 if header.schedule.begin else float(getattr(prepared, "init_noise_sigma", 1.0))
    return {"init_noise_sigma": sigma, "scales": list(combinations.scales), "terms": terms}
