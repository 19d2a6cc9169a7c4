"""Models and schedulers by the names that the command line takes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from stepgraph.assets.glyphs import ASSETS
from stepgraph.compiler.models import FAMILIES
from stepgraph.errors import CompileError

SHIPPED = {name: ASSETS / name for name in ("glyph-dit", "flux-emoji")}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm-single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}


def load_model(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in evaluation mode.

    Args:
        name: `glyph-dit`, `flux-emoji`, a diffusers folder or hub id, or `NAME:random` for a published size with random weights
            (seed 0), drawn where they will lie: other ones than on a CPU.
        device: Where its weights go; "meta" makes a model without any, to plan for.
        dtype: Of its weights.

    Raises:
        CompileError: There is no such model, or its class has no adapter.
    """
    if name.endswith(":random"):
        return _random_model(name.removesuffix(":random"), device, dtype)
    folder = SHIPPED.get(name, Path(name))
    if (folder / "transformer" / "config.json").is_file():
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise CompileError(
                f"no model at {name!r}: expected {', '.join(SHIPPED)}, a diffusers folder with a config.json, a hub id "
                f"(owner/name), or one of {', '.join(_random_names())}"
            )
        return _hub_model(name, device, dtype)
    try:
        class_name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise CompileError(f"{folder / 'config.json'} is not a model's configuration ({error})") from error
    # Without accelerate diffusers cannot load leaf by leaf, and says so at length unless it is not asked to.
    lean = find_spec("accelerate") is not None
    kind = model_class(class_name, str(folder))
    try:
        model = kind.from_pretrained(folder, low_cpu_mem_usage=lean, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CompileError(f"{folder}: no complete safetensors weights of a {class_name} ({first})") from error
    return _ready(model, device, dtype)


def load_to_plan(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model to make a plan for, which needs its structure only.

    `NAME:random` has no weights of its own, so that none are made: a plan for it fits any weights of that size. The contents of
    real weights are part of a plan's fingerprint, so that other models are loaded as a whole.

    Raises:
        CompileError: As `load_model`.
    """
    return load_model(name, "meta" if name.endswith(":random") else "cpu", dtype)


def load_scheduler(model_name: str, kind: str | None = None) -> Any:
    """The scheduler that lies beside a model (else its family's, or DDIM), or one of `SCHEDULERS` with its configuration.

    Raises:
        CompileError: Unknown kind.
    """
    import diffusers

    if kind is not None and kind not in SCHEDULERS:
        raise CompileError(f"unknown scheduler {kind!r}; known: {', '.join(SCHEDULERS)}")
    folder = SHIPPED.get(model_name, Path(model_name))
    places = [folder, folder / "scheduler"]
    usual, config = _usual_scheduler(model_name)
    for place in places:
        if (place / "scheduler_config.json").is_file():
            config = json.loads((place / "scheduler_config.json").read_text(encoding="utf-8"))
            break
    chosen = SCHEDULERS[kind] if kind is not None else config.get("_class_name", usual)
    return getattr(diffusers, chosen).from_config(config)


def _random_names() -> list[str]:
    return [f"{name}:random" for family in FAMILIES for name in family.random]


def _usual_scheduler(model_name: str) -> tuple[str, dict[str, Any]]:
    """Class name and configuration of the scheduler for a model that has none lying beside it."""
    for family in FAMILIES:
        if model_name.removesuffix(":random") in family.random:
            return family.scheduler[0], dict(family.scheduler[1])
    return "DDIMScheduler", {}


def _random_model(name: str, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    for family in FAMILIES:
        if name in family.random:
            torch.manual_seed(0)
            # On CPUs values are drawn in float32 and rounded; elsewhere where they will lie, as there may be no room for more.
            with torch.device(device), _parameters_in(torch.float32 if torch.device(device).type == "cpu" else dtype):
                model = model_class(family.classes[0], name).from_config(dict(family.random[name]))
            return _ready(model, device, dtype)
    raise CompileError(f"unknown size {name!r} for random weights; known: {', '.join(_random_names())}")


@contextmanager
def _parameters_in(dtype: torch.dtype) -> Iterator[None]:
    """Floating-point parameters are of this dtype from the moment on when a module registers them, before values are drawn."""

    def cast(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if not parameter.is_floating_point() or parameter.dtype == dtype:
            return None
        return nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)

    # What it returns is registered in place of the parameter, though its annotation says that it returns nothing.
    hook = register_module_parameter_registration_hook(cast)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _hub_model(name: str, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    return _ready(
        _pipeline(name, f"no model folder {name!r} here, and loading it from the hub failed").transformer, device, dtype
    )


def load_pipeline(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A whole diffusers pipeline, by a folder that it was saved to or a hub id.

    Raises:
        CompileError: There is none, it is not complete, or has code of its own.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise CompileError(f"{folder} has no model_index.json; expected a folder that a pipeline's save_pretrained wrote")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise CompileError(f"no pipeline at {name!r}: expected a folder with a model_index.json, or a hub id (owner/name)")
    where = f"{folder} is no complete pipeline" if folder.is_dir() else f"loading the pipeline {name!r} from the hub failed"
    return _pipeline(name, where, torch_dtype=dtype, use_safetensors=True).to(device)


def _pipeline(name: str, failed: str, **options: Any) -> Any:
    """A pipeline as diffusers loads it; where it cannot, an error that begins so."""
    import diffusers
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases: what its HTTP client raises, which is an OSError with some clients only.
    of_client = tuple(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception))
    failures: tuple[type[Exception], ...] = (
        *of_client, OSError, ImportError, SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    )  # fmt: skip
    try:
        return diffusers.DiffusionPipeline.from_pretrained(name, **options)
    except torch.OutOfMemoryError:
        raise
    except failures as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CompileError(f"{failed}: {first}") from error


def model_class(class_name: Any, where: str) -> Any:
    """The diffusers class of a name, which is one of those that have an adapter.

    Raises:
        CompileError: It is not; `where` says where the name stands.
    """
    supported = [name for family in FAMILIES for name in family.classes]
    if class_name not in supported:
        raise CompileError(f"{where}: the model class {class_name!r} has no adapter; supported: {', '.join(supported)}")
    module = next(family.module for family in FAMILIES if class_name in family.classes)
    return getattr(import_module(module), class_name)


def _ready(model: Any, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    # nn.Module's own cast: diffusers' warns of parts to keep in float32 even where it names none.
    module: nn.Module = nn.Module.to(model, device=device, dtype=dtype).eval()
    return module
