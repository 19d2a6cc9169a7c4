"""Fingerprints: which model, with which weights, a plan or executable belongs to."""

import hashlib
import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

# Digest of a tensor's contents, kept while the tensor lives, with the version, address and probe it was taken at.
_digests = WeakTensorKeyDictionary()


def has_data(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds values: it is neither on the meta device nor fake."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def config_of(owner: Any) -> dict[str, Any]:
    """The public entries of a diffusers model's or scheduler's configuration."""
    config = getattr(owner, "config", None)
    return {k: v for k, v in sorted(dict(config or {}).items()) if not k.startswith("_")}


def hash_config(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of a configuration."""
    text = json.dumps(config, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """SHA-256 of a tensor's bytes, memoised until the tensor is written to.

    Writes through `.data` move no version counter; a probe of some values notices those that change a tensor as a whole, as
    fusing a LoRA does.
    """
    flat = tensor.detach().flatten()
    probe = flat[:: max(1, flat.numel() // 16)].to("cpu").contiguous().view(torch.uint8).numpy().tobytes()
    state = None if tensor.is_inference() else (tensor._version, tensor.data_ptr(), probe)
    known = _digests.get(tensor)
    if known is None or state is None or known[0] != state:
        known = (state, hashlib.sha256(flat.to("cpu").contiguous().view(torch.uint8).numpy().data).digest())
        _digests[tensor] = known
    digest: bytes = known[1]
    return digest


def fingerprint(model: nn.Module) -> str:
    """ "structure/contents" of a model, 16 hexadecimal digits each.

    The structure covers class, configuration, parameter and buffer names and shapes (not dtypes, which plans record on
    their own); the contents cover dtypes and values, and are "-" for a model without data (fake or meta tensors).
    """
    structure, contents = hashlib.sha256(), hashlib.sha256()
    structure.update(f"{type(model).__name__} {hash_config(config_of(model))}".encode())
    filled = True
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        structure.update(f"{name} {tuple(tensor.shape)}".encode())
        filled = filled and has_data(tensor)
        if filled:
            contents.update(f"{name} {tensor.dtype}".encode() + tensor_digest(tensor))
    return f"{structure.hexdigest()[:16]}/{contents.hexdigest()[:16] if filled else '-'}"


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floating-point parameters."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def __getattr__(name: str) -> Any:
    """`refuse_other_model` lies with the plans that it compares with; it was here once, and is still found here."""
    if name == "refuse_other_model":
        return importlib.import_module("stepgraph.plan.refuse_other").refuse_other_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
