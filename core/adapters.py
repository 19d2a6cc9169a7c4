"""Adapters: what peft's tuner layers (LoRA and its kin) add to a model; without them it is its base."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

BASE = "base_layer"


def is_tuner(kind: type) -> bool:
    """Whether a class is one of peft's layers that stand in for another and add to it."""
    return any(one.__name__ == "BaseTunerLayer" and one.__module__.partition(".")[0] == "peft" for one in kind.__mro__)


def tuners_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The tuner layers of a model, by path."""
    return ((path, module) for path, module in model.named_modules() if is_tuner(type(module)))


def base_paths(kinds: Mapping[str, type]) -> dict[str, str]:
    """Where modules stand in the base: full path -> path without adapters; tuner layers and what they add are left out.

    Args:
        kinds: Classes by path, of every module of a model.
    """
    tuners = {path for path, kind in kinds.items() if is_tuner(kind)}
    found = {path: _base_path(path, tuners) for path in kinds if path not in tuners}
    return {path: base for path, base in found.items() if base is not None}


def _base_path(path: str, tuners: set[str]) -> str | None:
    """The path without adapters of a module or tensor; None for one that an adapter brought."""
    if not tuners:
        return path
    names: list[str] = []
    above = ""
    for name in path.split("."):
        if above not in tuners:
            names.append(name)
        elif name != BASE:
            return None
        above = f"{above}.{name}" if above else name
    return ".".join(names)


def base_names(model: nn.Module, names: Iterator[str] | list[str]) -> dict[str, str]:
    """The names that a model's tensors have in its base, by name; those that an adapter brought are left out."""
    tuners = {path for path, _ in tuners_of(model)}
    found = {name: _base_path(name, tuners) for name in names}
    return {name: base for name, base in found.items() if base is not None}


def changed_by_adapters(model: nn.Module) -> frozenset[str]:
    """Names of the tensors whose values are an adapter's: those that it brought, and those that it is merged into."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    base = base_names(model, names)
    merged = tuple(f"{path}.{BASE}." for path, tuner in tuners_of(model) if getattr(tuner, "merged_adapters", None))
    return frozenset(name for name in names if name not in base or (merged and name.startswith(merged)))


def in_training(model: nn.Module) -> str | None:
    """The path of a module in training mode; that of an adapter counts only where it drops values, for peft leaves it so."""
    modules = dict(model.named_modules())
    base = base_paths({path: type(module) for path, module in modules.items()})
    for path, module in modules.items():
        if module.training and (path in base or getattr(module, "p", 0.0) > 0):
            return path or type(model).__name__
    return None


def settle(model: nn.Module) -> int:
    """Take merged adapters that are switched off out of the weights, as the next forward of their layers would.

    Returns:
        From how many layers.
    """
    count = 0
    for _, tuner in tuners_of(model):
        if getattr(tuner, "_disable_adapters", False) and getattr(tuner, "merged_adapters", None):
            tuner.unmerge()  # type: ignore[operator]
            count += 1
    return count


def active_in(tuner: nn.Module) -> list[str]:
    """The adapters that a layer's forward adds, in order, or that are merged into its weights."""
    attributes: dict[str, Any] = vars(tuner)
    active = attributes.get("_active_adapter", [])
    active = [active] if isinstance(active, str) else list(active)
    merged = list(attributes.get("merged_adapters", ()))
    return merged or ([] if attributes.get("_disable_adapters") else active)


def active_adapters(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """The adapters that take part in a model's forward: path of the layer in the base, name, layer."""
    return ((path.replace(f".{BASE}", ""), adapter, tuner) for path, tuner in tuners_of(model) for adapter in active_in(tuner))


def tensors_of(tuner: nn.Module, adapter: str) -> list[tuple[str, Tensor]]:
    """What an adapter has brought to a layer, by what it is for there; the adapter's name is no part of that."""
    tensors = [*tuner.named_parameters(), *tuner.named_buffers()]
    mine = [(f".{name}.", tensor) for name, tensor in tensors if not name.startswith(f"{BASE}.")]
    named = [(name.replace(f".{adapter}.", "."), tensor) for name, tensor in mine if f".{adapter}." in name]
    return sorted(named, key=lambda item: item[0])
