"""Linear maps on CPUs with weights in oneDNN's own layout, one packed copy for all regions (DESIGN.md, decision 8)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from stepgraph.ops import LIBRARY
from stepgraph.packed import PackedWeights

DTYPES = frozenset({torch.float32, torch.bfloat16})


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]


PACKED = PackedWeights(_pack)


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


LIBRARY.define("packed_linear(Tensor x, Tensor weight, Tensor? bias, str activation='') -> Tensor")
LIBRARY.impl("packed_linear", run_packed_linear, "CPU")
torch.library.register_fake("stepgraph::packed_linear", _fake, lib=LIBRARY)
packed_linear = torch.ops.stepgraph.packed_linear.default
