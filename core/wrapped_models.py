"""What stands around a model: compiled and parallel wrappers, and hooks that move or cast its weights while it runs."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from stepgraph.errors import CompileError

# Wrappers that call the model beneath as it is -> where they keep it. By name: their modules take long to import.
BENEATH = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
SHARDED = ("FullyShardedDataParallel", "FSDPModule")
# Modes that change no operation's result: the default device, whose tensors' place is compared apart, and a counter's.
HARMLESS = ("DeviceContext", "_FlopCounterMode")
OFFLOAD = {
    "AlignDevicesHook": "sequential CPU offload (accelerate)",
    "CpuOffload": "model CPU offload (accelerate)",
    "UserCpuOffloadHook": "model CPU offload (accelerate)",
    "LayerwiseCastingHook": "layerwise casting",
    "group_offloading": "group offload (diffusers)",
    "layerwise_casting": "layerwise casting (diffusers)",
}


def unwrapped(model: Any) -> Any:
    """The model beneath what torch.compile or a data-parallel wrapper made of it; anything else as it is.

    Raises:
        CompileError: Its weights are sharded over processes.
    """
    while isinstance(model, nn.Module):
        names = [kind.__name__ for kind in type(model).__mro__]
        sharded = next((name for name in SHARDED if name in names), None)
        if sharded is not None:
            raise CompileError(
                f"{type(model).__name__} is sharded over processes ({sharded}), so that no process has its weights; compile "
                f"the model before it is wrapped, or one that is whole"
            )
        place = next((BENEATH[name] for name in names if name in BENEATH), None)
        beneath = model._modules.get(place) if place is not None else None
        if beneath is None:
            return model
        model = beneath
    return model


def refuse_around_measuring(device: torch.device) -> None:
    """See that nothing is measured in another precision than it runs in, or with what a mode makes of a forward.

    Raises:
        CompileError: Autocast is on, or a mode stands around (`refuse_modes`).
    """
    refuse_modes()
    if torch.is_autocast_enabled(device.type):
        raise CompileError(
            "autocast is on, but executables run without it, so that what is measured now would be of another model; convert "
            "the model to the lower precision, and leave autocast"
        )


def refuse_modes(besides: Sequence[str] = ()) -> None:
    """See that no mode of torch's stands around a run or a measurement: it would see a forward's operations, and none of
    compiled code's.

    Args:
        besides: Names of further modes that do no harm.

    Raises:
        CompileError: One does, which is neither the default device nor torch's counter of operations.
    """
    if not torch._C._len_torch_function_stack() and not torch._C._len_torch_dispatch_stack():
        return
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    other = next((mode for mode in modes if type(mode).__qualname__ not in (*HARMLESS, *besides)), None)
    if other is not None:
        raise CompileError(
            f"{type(other).__name__} stands around the call, which changes or watches what a forward calls, and executables "
            f"call other things; leave it, or let the model answer (detached, where an executable is attached)"
        )


def uncompiled(part: Any) -> Any:
    """A module without what `module.compile()` keeps beside it, on the same parameters; anything else as it is."""
    if not isinstance(part, nn.Module) or all(module._compiled_call_impl is None for module in part.modules()):
        return part
    twin = object.__new__(type(part))
    children = {name: uncompiled(child) for name, child in part._modules.items()}
    twin.__dict__ = {**vars(part), "_compiled_call_impl": None, "_modules": children}
    return twin


def forward_signature(model: nn.Module) -> inspect.Signature:
    """The signature of a model's forward; of a base class's where a subclass's own is (*args, **kwargs)."""
    own_signature = inspect.signature(model.forward)
    signatures = [inspect.signature(vars(kind)["forward"]) for kind in type(model).__mro__ if "forward" in vars(kind)]
    for signature in (own_signature, *(_without_self(one) for one in signatures)):
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
            return signature
    return own_signature


def _without_self(signature: inspect.Signature) -> inspect.Signature:
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def refuse_offload(model: nn.Module) -> None:
    """Refuse a model whose weights are moved, cast or cached by hooks while it runs: graphs would use what lies there between.

    Raises:
        CompileError: The message names the hook, the module and how to take it off.
    """
    for module in _hooked(model):
        attributes = module.__dict__
        where = next(path for path, other in model.named_modules() if other is module) or type(model).__name__
        for name in _accelerate_hooks(attributes.get("_hf_hook")):
            raise CompileError(
                f"{where} has accelerate's hook {name}: {OFFLOAD.get(name, 'it changes what the module does')}. Graphs use the "
                f"weights where they are; take it off (pipe.remove_all_hooks(), "
                f"accelerate.hooks.remove_hook_from_module(model, recurse=True)), move the model to one device, and compile it "
                f"there"
            )
        for name in getattr(attributes.get("_diffusers_hook"), "hooks", {}):
            raise CompileError(
                f"{where} has the diffusers hook {name}: {OFFLOAD.get(name, 'it changes what the module does')}. Graphs would "
                f"run without it, or keep what it does now; take it off ({where}._diffusers_hook.remove_hook({name!r}), "
                f"model.disable_cache() for caches), or load the model without it"
            )


def _hooked(model: nn.Module) -> list[nn.Module]:
    """The modules that have hooks of these libraries; asked at the beginning of every run, so without names."""
    hooked, pending = [], [model]
    seen = set[int]()
    while pending:
        module = pending.pop()
        attributes = module.__dict__
        if id(module) in seen:
            continue
        seen.add(id(module))
        if "_hf_hook" in attributes or "_diffusers_hook" in attributes:
            hooked.append(module)
        pending.extend(child for child in attributes["_modules"].values() if child is not None)
    return hooked


def _accelerate_hooks(hook: Any) -> list[str]:
    """The hooks among these that do more than see that inputs are where the weights are."""
    names = [type(hook).__name__] if hook is not None else []
    if names == ["SequentialHook"]:
        return [name for inner in hook.hooks for name in _accelerate_hooks(inner)]
    harmless = names == ["AlignDevicesHook"] and not getattr(hook, "offload", True)
    return [] if harmless else names
