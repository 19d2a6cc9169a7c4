"""Artifacts become executables: the model is compared or built, the plan compiled, and other versions are put to the test."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepgraph.checks import check_device
from stepgraph.compiler.entry.load_model import SCHEDULERS, model_class
from stepgraph.compiler.models import FAMILIES
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.errors import ArgumentError, CompileError, FileFormatError, MismatchError, PlanError, TraceError
from stepgraph.files.tensor_record import parse_tensors
from stepgraph.fingerprint import model_dtype
from stepgraph.inputs import TIMESTEPS, flat_inputs, like_flat, timestep_key
from stepgraph.metrics import relative_l2
from stepgraph.plan.factors import Factors, refuse_model
from stepgraph.plan.refuse_other import follow_model
from stepgraph.runtime.artifact.artifact import Artifact, current_versions
from stepgraph.runtime.artifact.read_artifact import read_artifact
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.program.program import zero_inputs
from stepgraph.runtime.program.stated_facts import other_facts, stated_facts
from stepgraph.schedule import TimestepInput
from stepgraph.tolerances import FIRST_STEP, tolerance
from stepgraph.wrapped_models import unwrapped

# Larger settings make tables that no scheduler of this list needs.
LARGEST_SETTING = 100_000
# What diffusers' constructors raise for values that they do not check: settings of a wrong kind, size or name.
OF_CONFIGURATIONS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def load_artifact(
    path: str | Path, model: nn.Module | None = None, *, device: str | torch.device | None = None, verify: bool | None = None
) -> Executable:
    """Read an artifact and compile it for its model (`stepgraph.load`)."""
    return compile_artifact(read_artifact(path), model, device=device, verify=verify)


def compile_artifact(
    artifact: Artifact,
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    verify: bool | None = None,
) -> Executable:
    """The rest of `load_artifact`."""
    model = unwrapped(model)
    path = artifact.path
    # Weights that an artifact brings are its own; those that are given need be no others than the plan follows.
    built = model is None
    values = artifact.model["fingerprint"].split("/")[-1] if built else "-"
    if model is None:
        model = build_model(artifact, check_device("device", device or "cpu"))
    place = next(model.parameters()).device
    if device is not None and check_device("device", device).type != place.type:
        raise CompileError(f"the model is on {place}, but device is {device}; move the model, or leave device out")
    structure = artifact.model["fingerprint"].split("/")[0]
    refuse_model(f"{path}: the artifact is", (artifact.model["class"], f"{structure}/{values}", artifact.model["dtype"]), model)
    follow_model(artifact.plan, model, artifact.options.strict)
    factors = None if artifact.factors is None else Factors.parse(artifact.factors, f"{path}: factors.safetensors")
    inputs = zero_inputs(artifact.inputs, place)
    try:
        executable = compile_plan(model, artifact.plan, inputs, artifact.options, factors)
    except (PlanError, TraceError) as error:
        # An artifact can state inputs that its model does not take.
        raise FileFormatError(f"{path}: {error}") from error
    difference = other_facts(artifact.model.get("facts", {}), stated_facts(executable.default.facts)) if built else None
    if difference is not None:
        fact, saved, rebuilt = difference
        raise MismatchError(
            f"{path}: the model that was saved had {fact} = {saved}, one of its class and configuration has {rebuilt}; "
            f"make the model as it was, load its weights, and pass it: stepgraph.load(path, model)"
        )
    others = {name: (recorded, now) for name, recorded, now in _versions(artifact) if recorded != now}
    compared = verify or (bool(others) and verify is None)
    if others:
        # Texts from outside must not write to a terminal.
        said = ", ".join(f"{name} {recorded!a} (here {now})" for name, (recorded, now) in others.items())
        then = "its first step is compared with the model's" if compared else "nothing is compared with the model's steps"
        warnings.warn(f"{path} was made with {said}; {then}", UserWarning, stacklevel=5)
    if compared:
        verify_first_step(executable)
    return executable


def _versions(artifact: Artifact) -> list[tuple[str, str, str]]:
    now = current_versions()
    return [(name, artifact.versions[name], now[name]) for name in ("stepgraph", "torch", "diffusers")]


def verify_first_step(executable: Executable) -> None:
    """Compare an executable's first step, in which nothing can be reused, with the eager model's on random latents.

    Raises:
        CompileError: They differ by more than rounding, or at all where the executable is exact.
    """
    if executable.example is None:
        raise CompileError("this executable does not know the inputs that it was compiled with; compile it anew")
    model, header, generator = executable.model, executable.plan.header, torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    inputs = zero_inputs(executable.example, device)
    random = {
        name: torch.randn(value.shape, generator=generator).to(value)
        for name, value in flat_inputs(inputs).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in TIMESTEPS
    }
    inputs = like_flat(inputs, random)
    name = timestep_key(inputs)
    if name is not None and isinstance(inputs[name], torch.Tensor):
        example = inputs[name]
        first = torch.full(example.shape, header.timesteps[0], device=device)
        # Of a class without an adapter any timestep serves to compare with.
        inputs[name] = (header.timestep or TimestepInput())(first, model_dtype(model)).to(example.dtype)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    output = executable.session()(**inputs, return_dict=False)[0]
    error, limit = relative_l2(output, expected), 0.0 if executable.config.exact else tolerance(FIRST_STEP, model_dtype(model))
    if not error <= limit:
        raise CompileError(
            f"the first step differs from {type(model).__name__}'s by {error:.2g} (relative L2; {limit:g} can be rounding): "
            f"these versions of torch and diffusers do not compile it rightly; use those that the artifact was made with"
        )


def build_model(artifact: Artifact, device: str | torch.device = "cpu") -> nn.Module:
    """The model of an artifact that brings its weights.

    Raises:
        PlanError: It brings none, or they do not fit the configuration.
        CompileError: Its class is none of those that stepgraph knows.
    """
    path, about = artifact.path, artifact.model
    if artifact.weights is None:
        raise ArgumentError(f"{path} has no weights; pass the model it was made for, a {about['class']}, to stepgraph.load")
    kind = model_class(about["class"], str(path))
    tensors = parse_tensors(artifact.weights, f"{path}: weights.safetensors")
    _refuse_sizes(about["config"], tensors, path)
    try:
        with torch.device("meta"):
            model: nn.Module = kind(**about["config"])
    except torch.OutOfMemoryError:
        raise
    except OF_CONFIGURATIONS as error:
        raise FileFormatError(f"{path}: no {about['class']} can be made of its configuration ({error})") from error
    _tie(model, about["tied"], path)
    _assign(model, {name: tensor.to(device) for name, tensor in tensors.items()}, path)
    return model.eval()


def _refuse_sizes(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """A configuration is refused before a model is made of it where that would be larger than its weights."""
    elements = sum(tensor.numel() for tensor in tensors.values())
    for name, value in config.items():
        size = value if isinstance(value, (int, float)) else 0
        limit = len(tensors) if "layers" in name else elements
        # Position tables have a row per patch.
        area = name in ("sample_size", "pos_embed_max_size") and size * size > 64 * elements
        if not abs(size) <= max(limit, 1000 if "layers" not in name else 0) or area:
            raise FileFormatError(
                f"{path}: its configuration has {name} {value}, more than its {len(tensors)} weights can be for"
            )


def _tie(model: nn.Module, tied: Mapping[str, str], path: Path) -> None:
    """Let names share a weight that shared one when the artifact was saved."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = parameters | dict(model.named_buffers(remove_duplicate=False))
    for name, first in tied.items():
        pair = [known.get(name), known.get(first)]
        shapes = {tensor.shape for tensor in pair if tensor is not None}
        if None in pair or len(shapes) > 1 or (name in parameters) != (first in parameters):
            raise FileFormatError(f"{path}: {name!r} is said to be the same weight as {first!r}; the model has no such pair")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, known[first])


def _assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Put tensors in the places of a model's own; one that has several names is the same one in all of them."""
    with torch.no_grad():
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        if set(named) != set(tensors):
            name = sorted(set(named) ^ set(tensors))[0]
            raise FileFormatError(f"{path}: the weights {'lack' if name in named else 'have more than the model:'} {name!r}")
        for name, tensor in tensors.items():
            if tensor.shape != named[name].shape:
                raise FileFormatError(
                    f"{path}: the weight {name} is {list(tensor.shape)}; the model's is {list(named[name].shape)}"
                )
        places: dict[int, Any] = {
            id(old): nn.Parameter(tensors[name], requires_grad=False) if isinstance(old, nn.Parameter) else tensors[name]
            for name, old in named.items()
        }
        for module in model.modules():
            for tensors_of_module in (module._parameters, module._buffers):
                tensors_of_module |= {name: places[id(old)] for name, old in tensors_of_module.items() if old is not None}
    plain = {name: value for module in model.modules() for name, value in vars(module).items()}
    left = [name for name, value in plain.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if left:
        raise FileFormatError(f"{path}: {left[0]!r} has no values; this class cannot be rebuilt from its weights")


def build_scheduler(artifact: Artifact) -> Any:
    """The scheduler that an artifact brings, or None.

    Raises:
        PlanError: Its class is none of those that stepgraph knows, or its configuration is not valid.
    """
    import diffusers

    if "config" not in artifact.scheduler:
        return None
    name, config = artifact.scheduler["class"], artifact.scheduler["config"]
    known = sorted({*SCHEDULERS.values(), *(family.scheduler[0] for family in FAMILIES)})
    if name not in known:
        raise FileFormatError(
            f"{artifact.path}: the scheduler {name!r} is not rebuilt from artifacts (only {', '.join(known)}); pass it"
        )
    large = [key for key, value in config.items() if isinstance(value, (int, float)) and not abs(value) <= LARGEST_SETTING]
    if large:
        raise FileFormatError(
            f"{artifact.path}: its scheduler has {large[0]} {config[large[0]]}; at most {LARGEST_SETTING} is usual"
        )
    try:
        return getattr(diffusers, name).from_config(dict(config))
    except OF_CONFIGURATIONS as error:
        raise FileFormatError(f"{artifact.path}: no {name} can be made of its configuration ({error})") from error
