"""Linear maps on CPUs with weights in oneDNN's own layout, one packed copy for all regions (docs/design.md, decision 8)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepgraph.ops import LIBRARY
from stepgraph.packed_weights import PackedWeights

DTYPES = frozenset({torch.float32, torch.bfloat16})


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # type: ignore[no-any-return]


PACKED = PackedWeights(_pack)
# Biases of merged maps, one behind the other.
STACKED = PackedWeights(lambda stacked: stacked)


def packs(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes a linear map of these, fake or real."""
    return (
        torch.backends.mkldnn.is_available()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and weight.ndim == 2
        and weight.is_contiguous()
        and x.numel() > 0
        and (x.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


# What oneDNN applies to a product before it is rounded, by the names of `packed_linear` -> its own name and algorithm.
ACTIVATIONS = {"": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


def run_packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
    """`F.linear(x, weight, bias)`, and one of `ACTIVATIONS` of it: x [..., C_in], weight [C_out, C_in], bias [C_out]."""
    name, algorithm = ACTIVATIONS[activation]
    return torch.ops.mkldnn._linear_pointwise(x, PACKED.get(weight), bias, name, [], algorithm)  # type: ignore[no-any-return]


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
    return F.linear(x, weight, bias)


def run_packed_columns(x: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> Tensor:
    """`F.linear(x, weight[:, start:stop], bias)`: x [..., stop - start], weight [C_out, C_in], bias [C_out].

    The whole weight is the argument: compiled code makes views whose versions do not follow it.
    """
    return run_packed_linear(x, weight[:, start:stop], bias)


def _fake_columns(x: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> Tensor:
    return F.linear(x, weight[:, start:stop], bias)


def run_merged_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Several linear maps as one: their results side by side.

    Args:
        x: [..., C_in].
        weights: [C_i, C_in] each; packed as one, and anew when one of them has been written to.
        biases: [C_i] each; empty for maps without.

    Returns:
        [..., sum C_i].
    """
    bias = STACKED.get(*biases) if biases else None
    return torch.ops.mkldnn._linear_pointwise(x, PACKED.get(*weights), bias, "none", [], "")  # type: ignore[no-any-return]


def linear_maps(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """What `merged_linear` computes, map by map, in plain torch."""
    products = [F.linear(x, weight, biases[i] if biases else None) for i, weight in enumerate(weights)]
    return torch.cat(products, dim=-1)


def _fake_merged(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


def _registered(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    """An operation that graphs call, as torch has it."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"stepgraph::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.stepgraph, name).default


packed_linear = _registered(
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, str activation='') -> Tensor", run_packed_linear, _fake
)
packed_columns = _registered(
    "packed_columns(Tensor x, Tensor weight, Tensor? bias, int start, int stop) -> Tensor", run_packed_columns, _fake_columns
)
merged_linear = _registered(
    "merged_linear(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor", run_merged_linear, _fake_merged
)
