"""Settings of the process that a forward depends on without reading them itself."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.modules import module as torch_modules
from torch.utils.module_tracker import ModuleTracker

DISPATCHER = "diffusers.models.attention_dispatch"


def _dispatcher(name: str) -> Any:
    """What the registry of diffusers' attention backends has under a name; None where nobody has imported it."""
    module = sys.modules.get(DISPATCHER)
    return getattr(getattr(module, "_AttentionBackendRegistry", None), name, None)


def _hooks(hooks: Mapping[int, Callable[..., Any]]) -> tuple[Callable[..., Any], ...]:
    """Those that run around every module; without the ones of torch's counter of operations, which any thread may be using."""
    return tuple(hook for hook in list(hooks.values()) if not isinstance(getattr(hook, "__self__", None), ModuleTracker))


# Not among them are those that operations ask when they run: the precision of matrix products, determinism, which attention
# kernels may be chosen. Autocast is switched off by a trace, and refused by every call.
SETTINGS: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("torch.get_default_dtype()", torch.get_default_dtype),
    ("torch.get_default_device()", torch.get_default_device),
    ("the hooks before every module's forward", lambda: _hooks(torch_modules._global_forward_pre_hooks)),
    ("the hooks behind every module's forward", lambda: _hooks(torch_modules._global_forward_hooks)),
    ("diffusers' active attention backend", lambda: _dispatcher("_active_backend")),
    ("diffusers' checks of attention inputs", lambda: _dispatcher("_checks_enabled")),
)


def process_state() -> dict[str, Any]:
    """The settings as they are, by name, without those of what nobody has imported."""
    return {name: value for name, get in SETTINGS if (value := get()) is not None}
