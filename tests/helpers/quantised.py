"""Tiny DiTs with weights that are no plain tensors, each kind made by the tool that people use for it."""

import warnings
from collections.abc import Callable

import diffusers
import gguf
import torch
from torch import nn

from helpers.tiny import tiny_dit

# GGUF's K-quants come in blocks of 256 values.
WIDE = {"num_attention_heads": 2, "attention_head_dim": 128}


def attention_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of the blocks, by path."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("transformer_blocks") and isinstance(module, nn.Linear)
    }


def torchao_quantise(model: nn.Module, config: str, **options) -> None:
    """Quantise every linear map of a model by torchao."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)(**options))


def torchao_dit(config: str, **options) -> diffusers.DiTTransformer2DModel:
    """Every linear map quantised by torchao."""
    model = tiny_dit()
    torchao_quantise(model, config, **options)
    return model


def gguf_dit(kind: gguf.GGMLQuantizationType) -> diffusers.DiTTransformer2DModel:
    """The linear maps of the blocks as diffusers loads them from a GGUF file."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    model = tiny_dit(**WIDE)
    for path, linear in attention_maps(model).items():
        packed = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32)
        data = torch.from_numpy(_quantised(linear.weight.detach(), kind))
        packed.weight = GGUFParameter(data, quant_type=kind)
        packed.bias = linear.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, packed.requires_grad_(False).eval())
    return model


def _quantised(weight: torch.Tensor, kind: gguf.GGMLQuantizationType):
    """Bytes [out, row]. The gguf package writes Q8_0 itself; of a K-quant any bytes with sane scales are a weight."""
    if kind == gguf.GGMLQuantizationType.Q8_0:
        return gguf.quants.quantize(weight.numpy(), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = weight.numel() // block
    data = torch.randint(0, 256, (blocks, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # Q4_K begins with two half-precision scales.
    data[:, :4] = torch.full((blocks, 2), 0.0005, dtype=torch.float16).view(torch.uint8)
    return data.reshape(weight.shape[0], -1).numpy()


class QuantState:
    """What bitsandbytes keeps beside its four-bit weights."""

    def __init__(self, absmax: torch.Tensor, shape: torch.Size) -> None:
        self.absmax, self.shape = absmax, shape


class FourBit(nn.Parameter):
    """Stands in for bitsandbytes' `Params4bit`: bytes [n, 1], with an object that has scales and shape beside them."""

    def __new__(cls, data: torch.Tensor, state: QuantState) -> "FourBit":
        parameter = torch.Tensor._make_subclass(cls, data, False)
        parameter.quant_state = state
        return parameter


class FourBitLinear(nn.Linear):
    """Stands in for `Linear4bit`, which notes at its first call in which dtype it computes."""

    compute_dtype: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Unpack and multiply."""
        if self.compute_dtype is None:
            self.compute_dtype = x.dtype
        state = self.weight.quant_state
        bytes_ = torch.Tensor._make_subclass(torch.Tensor, self.weight).flatten()
        values = torch.stack([bytes_ & 15, bytes_ >> 4], dim=1).to(self.compute_dtype).reshape(state.shape) - 8
        return nn.functional.linear(x.to(self.compute_dtype), values * state.absmax, self.bias).to(x.dtype)


def four_bit_dit() -> diffusers.DiTTransformer2DModel:
    """The linear maps of the blocks with weights like bitsandbytes'."""
    model = tiny_dit()
    for linear in attention_maps(model).values():
        weight = linear.weight.detach()
        absmax = weight.abs().amax(1, keepdim=True) / 7
        values = ((weight / absmax).round() + 8).clamp(0, 15).to(torch.uint8).flatten()
        linear.__class__ = FourBitLinear
        linear.weight = FourBit((values[::2] | values[1::2] << 4)[:, None], QuantState(absmax, weight.shape))
    return model


MAKERS: dict[str, Callable[[], diffusers.DiTTransformer2DModel]] = {
    "torchao int8": lambda: torchao_dit("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": lambda: torchao_dit("Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8": lambda: torchao_dit("Float8WeightOnlyConfig"),
    "GGUF Q8_0": lambda: gguf_dit(gguf.GGMLQuantizationType.Q8_0),
    "GGUF Q4_K": lambda: gguf_dit(gguf.GGMLQuantizationType.Q4_K),
    "four bits": four_bit_dit,
}
