"""Settings of the process that a forward depends on without reading them itself, or by asking torch."""

import os
import sys
import threading
from collections.abc import Callable, Container, Mapping
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


# Autocast is switched off by a trace, and refused by every call.
SETTINGS: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("torch.get_default_dtype()", torch.get_default_dtype),
    ("torch.get_default_device()", torch.get_default_device),
    ("the hooks before every module's forward", lambda: _hooks(torch_modules._global_forward_pre_hooks)),
    ("the hooks behind every module's forward", lambda: _hooks(torch_modules._global_forward_hooks)),
    ("diffusers' active attention backend", lambda: _dispatcher("_active_backend")),
    ("diffusers' checks of attention inputs", lambda: _dispatcher("_checks_enabled")),
)


# Settings that operations ask when they run, so that they count only where the forward itself asks: by the name that it does
# so under.
ASKED: Mapping[str, Callable[[], Any]] = {
    "are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled,
    "is_deterministic_algorithms_warn_only_enabled": torch.is_deterministic_algorithms_warn_only_enabled,
    "get_deterministic_debug_mode": torch.get_deterministic_debug_mode,
    "get_float32_matmul_precision": torch.get_float32_matmul_precision,
    "get_num_threads": torch.get_num_threads,
    "get_num_interop_threads": torch.get_num_interop_threads,
    "is_inference_mode_enabled": torch.is_inference_mode_enabled,
    "flash_sdp_enabled": torch.backends.cuda.flash_sdp_enabled,
    "mem_efficient_sdp_enabled": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math_sdp_enabled": torch.backends.cuda.math_sdp_enabled,
    "cudnn_sdp_enabled": torch.backends.cuda.cudnn_sdp_enabled,
    "allow_tf32": lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
    "benchmark": lambda: torch.backends.cudnn.benchmark,
    "deterministic": lambda: torch.backends.cudnn.deterministic,
    "getcwd": os.getcwd,
    "cwd": os.getcwd,
    "current_thread": lambda: threading.current_thread().name,
}
QUESTION = "the process's answer to "


def process_state(asked: Container[str] = ()) -> dict[str, Any]:
    """The settings as they are, by name, without those of what nobody has imported.

    Args:
        asked: The names of those among `ASKED` that count, as they are in what this returns.
    """
    settings = {name: value for name, get in SETTINGS if (value := get()) is not None}
    return settings | {label: get() for name, get in ASKED.items() if (label := QUESTION + name) in asked}
