"""Fingerprints: which model, with which weights, a plan or executable belongs to."""

import hashlib
import importlib
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from stepgraph.adapters import active_adapters, base_names, tensors_of
from stepgraph.checked import checked
from stepgraph.checks import shown
from stepgraph.contents import content_sum, content_sums
from stepgraph.env import get_logger
from stepgraph.errors import MismatchError
from stepgraph.weight_kinds import describe_kind, inner_tensors, is_plain, kind_of

# What contents that are told by sums begin with; those of files of before are SHA-256, and begin with a digit.
SUMS = "s"
# SHA-256 of a tensor's bytes, kept while the tensor lives, with the sum of its bits.
_digests = WeakTensorKeyDictionary()
# Models whose contents were hashed with SHA-256, for files of before.
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@checked
def has_data(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds values: it is neither on the meta device nor fake, and nothing that it is made of is."""
    return all(part.device.type != "meta" and not isinstance(part, FakeTensor) for part in inner_tensors(tensor).values())


def config_of(owner: Any) -> dict[str, Any]:
    """The public entries of a diffusers model's or scheduler's configuration."""
    config = getattr(owner, "config", None)
    if config is not None and not isinstance(config, Mapping):
        raise MismatchError(
            f"the config of {shown(owner)} is {shown(config)}, whose entries are not told from others; expected a mapping"
        )
    return {k: v for k, v in sorted((config or {}).items()) if not k.startswith("_")}


@checked
def hash_config(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of a configuration."""
    text = json.dumps(config, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@checked
def tensor_digest(tensor: torch.Tensor) -> bytes:
    """SHA-256 of a tensor's bytes; of one that is no plain tensor, of its class, its attributes and its inner tensors.

    Raises:
        MismatchError: It does not say which tensors it is made of, or holds no values.
    """
    parts = _parts_of(tensor)
    if is_plain(tensor):
        return _digest_of(tensor, tensor)
    digest = hashlib.sha256(describe_kind(tensor).encode())
    for name, part in parts.items():
        # A weight's own bytes are looked at through another tensor each time.
        digest.update(f" {name} {tuple(part.shape)} {part.dtype}".encode() + _digest_of(part, part if name else tensor))
    return digest.digest()


def _parts_of(tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """The plain tensors that a tensor is made of.

    Raises:
        MismatchError: It does not say which, or holds no values.
    """
    if tensor.layout != torch.strided:
        raise MismatchError(f"{shown(tensor)} has the layout {tensor.layout}, whose contents are not told apart; make it dense")
    if not has_data(tensor):
        raise MismatchError(
            f"{shown(tensor)} holds no values that could be told from others (it is fake, or on the meta device)"
        )
    parts = inner_tensors(tensor)
    if not parts:
        raise MismatchError(
            f"a weight is a {kind_of(tensor)}, which does not say what it is made of (it has no __tensor_flatten__, and no "
            f"tensors among its attributes), so that there is no telling it from others; convert it to plain tensors"
        )
    return parts


def _digest_of(tensor: torch.Tensor, keeper: torch.Tensor) -> bytes:
    """SHA-256 of a plain tensor's bytes, memoised with `keeper` until the tensor is written to.

    Writes through `.data` move no version counter; sums of all bits, which are found faster, notice them.
    """
    state: int = content_sums([tensor]).tolist()[0]
    known = _digests.get(keeper)
    if known is None or known[0] != state:
        flat = tensor.detach().flatten().to("cpu").contiguous()
        known = (state, hashlib.sha256(flat.view(torch.uint8).numpy().data).digest())
        _digests[keeper] = known
    digest: bytes = known[1]
    return digest


@checked
def fingerprint(model: nn.Module, like: str = "") -> str:
    """ "structure/contents" of a model without its adapters: 16 hexadecimal digits each, and "s" before those of the contents.

    The structure covers class, configuration, parameter and buffer names and shapes (not dtypes, which plans record on
    their own); the contents cover dtypes and values, and are "-" for a model without data (fake or meta tensors). What peft's
    tuner layers add counts for nothing here (`adapters_hash`), and what they stand in for has the name that it had before.

    Args:
        model: The model.
        like: A fingerprint that this one is compared with: contents are in its form.
    """
    return f"{structure_hash(model)}/{contents_hash(model, like=like.split('/')[-1])}"


@checked
def structure_hash(model: nn.Module, adapters: bool = False) -> str:
    """The first half of `fingerprint`, which reads no values; with adapters as parts of the model, if these are to count."""
    structure = hashlib.sha256(f"{type(model).__name__} {hash_config(config_of(model))}".encode())
    for name, tensor in named_tensors(model, adapters):
        structure.update(f"{name} {tuple(tensor.shape)}".encode())
    return structure.hexdigest()[:16]


@checked
def contents_hash(model: nn.Module, adapters: bool = False, like: str = "") -> str:
    """The second half of `fingerprint`: a hash of every tensor's name, dtype and sums (`content_sums`).

    Sums are computed where a tensor lies, with little memory beside it (what is not contiguous is copied), and are the same on
    every device, which is waited for once. `content_sums` says by what chance other values are taken for the same; nothing of
    this holds against intent.

    Args:
        model: The model.
        adapters: Whether they count, as parts of the model.
        like: Contents that these are compared with; those of a file of before are SHA-256, for which all weights are brought to
            the CPU, once.
    """
    tensors = named_tensors(model, adapters)
    if not all(has_data(tensor) for _, tensor in tensors):
        return "-"
    if like not in ("", "-") and not like.startswith(SUMS):
        return _contents_of_before(model, tensors)
    described, sums = [], []
    for name, tensor in tensors:
        parts = _parts_of(tensor)
        described.append(name if is_plain(tensor) else f"{name} {describe_kind(tensor)}")
        for inner, part in parts.items():
            described.append(f"{inner} {tuple(part.shape)} {part.dtype}")
            sums.append(content_sum(part))
    contents = hashlib.sha256(repr((described, _brought(sums))).encode())
    return f"{SUMS}{contents.hexdigest()[:16]}"


def _brought(sums: Sequence[torch.Tensor]) -> list[int]:
    """Numbers from their devices, each of which is waited for once."""
    numbers = [0] * len(sums)
    for device in {each.device for each in sums}:
        places = [place for place, each in enumerate(sums) if each.device == device]
        for place, value in zip(places, torch.cat([sums[place] for place in places]).tolist(), strict=True):
            numbers[place] = value
    return numbers


def _contents_of_before(model: nn.Module, tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
    """What files of before have as contents: SHA-256 of all weights."""
    if model not in _told:
        _told.add(model)
        get_logger("fingerprint").info(
            "compared with a file that states SHA-256 of the weights of %s: all of them are read on the CPU, once; files that "
            "are written now do without",
            type(model).__name__,
        )
    contents = hashlib.sha256()
    for name, tensor in tensors:
        contents.update(f"{name} {tensor.dtype}".encode() + tensor_digest(tensor))
    return contents.hexdigest()[:16]


@checked
def named_tensors(model: nn.Module, adapters: bool = False) -> list[tuple[str, torch.Tensor]]:
    """A model's parameters and buffers with all of their names, by name; of its base unless adapters count."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = {} if adapters else base_names(model, [name for name, _ in tensors])
    return sorted(
        ((names.get(name, name), tensor) for name, tensor in tensors if adapters or name in names), key=lambda item: item[0]
    )


@checked
def adapters_hash(model: nn.Module) -> str:
    """16 hexadecimal digits of the adapters that take part in a model's forward: tensors and strengths.

    Returns:
        Nothing where none do: none is loaded, or those that are, are switched off; "-" where they have no data.
    """
    hashed, some = hashlib.sha256(), False
    for path, adapter, tuner in active_adapters(model):
        strength = vars(tuner).get("scaling", {}).get(adapter, 1.0)
        merged = adapter in vars(tuner).get("merged_adapters", ())
        brought = tensors_of(tuner, adapter)
        if not all(has_data(tensor) for _, tensor in brought):
            return "-"
        if brought:
            some = True
            hashed.update(f"{path} {float(strength)!r} {merged}".encode())
        for name, tensor in brought:
            hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor_digest(tensor))
    return hashed.hexdigest()[:16] if some else ""


@checked
def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


@checked
def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floating-point parameters; of what they stand for where they are quantised.

    Raises:
        MismatchError: It has none.
    """
    dtype: torch.dtype | None = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype is None:
        raise MismatchError(f"{type(model).__name__} has no floating-point parameter that would tell the dtype it computes in")
    return dtype


def __getattr__(name: str) -> Any:
    """`refuse_other_model` lies with the plans that it compares with; it was here once, and is still found here."""
    if name == "refuse_other_model":
        return importlib.import_module("stepgraph.plan.refuse_other").refuse_other_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
