"""FLUX.1: text-to-image transformers of double and single stream blocks (diffusers' FluxTransformer2DModel).

A double block keeps image and text tokens apart and joins them in one attention with two outputs; a single block runs
attention and MLP side by side over all tokens, and `proj_out` takes both. There are no `block` sites: a block hands on two
streams, and one reused value cannot stand for them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stepgraph.compiler.interfaces.family import Family, Stack
from stepgraph.errors import ArgumentError, CompileError
from stepgraph.inputs import POSITIONS
from stepgraph.schedule import TimestepInput

# 1024 x 1024 pixels: latents of 128 x 128 in patches of 2 x 2. The configuration does not say.
SIDE, TEXT = 64, 512


def example_inputs(config: Mapping[str, Any], batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs for 1024 x 1024 pixels and 512 text tokens.

    Packed latents [B, 4096, C] and text embeddings [B, 512, D] in `dtype`, pooled text [B, P], timestep [B] in 0..1, guidance
    [B] for models distilled with it, and positions [4096, 3] and [512, 3], which have no batch dimension.
    """
    inputs = {
        "hidden_states": torch.zeros(batch, SIDE * SIDE, config["in_channels"], dtype=dtype, device=device),
        "encoder_hidden_states": torch.zeros(batch, TEXT, config["joint_attention_dim"], dtype=dtype, device=device),
        "pooled_projections": torch.zeros(batch, config["pooled_projection_dim"], dtype=dtype, device=device),
        "timestep": torch.zeros(batch, dtype=dtype, device=device),
        "img_ids": positions(SIDE, dtype, device),
        "txt_ids": torch.zeros(TEXT, 3, dtype=dtype, device=device),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.zeros(batch, dtype=torch.float32, device=device)
    return inputs


def positions(side: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Positions [side * side, 3] of a square image's tokens: 0, row, column."""
    axis = torch.arange(side, dtype=dtype, device=device)
    rows, columns = axis.repeat_interleave(side), axis.repeat(side)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=1)


def completed(conditioning: dict[str, Any], tokens: int | None) -> dict[str, Any]:
    """The conditioning with the positions that pipelines make: of a square image, 1024 x 1024 pixels unless its tokens say
    otherwise, and zeros for the text.

    Raises:
        ArgumentError: The image is no square, so that its positions must be given.
    """
    text, side = conditioning.get("encoder_hidden_states"), SIDE if tokens is None else math.isqrt(tokens)
    if not isinstance(text, torch.Tensor) or text.ndim != 3:
        return conditioning
    filled = dict(conditioning)
    if "img_ids" not in conditioning:
        if tokens is not None and side * side != tokens:
            raise ArgumentError(f"conditioning lacks img_ids, and {tokens} image tokens are no square; pass their positions")
        filled["img_ids"] = positions(side, text.dtype, text.device)
    if "txt_ids" not in conditioning:
        filled["txt_ids"] = torch.zeros(text.shape[1], 3, dtype=text.dtype, device=text.device)
    return filled


def sigmas(steps: int) -> tuple[float, ...]:
    """The noise levels that FLUX's pipelines set: from 1 to 1 / steps, evenly."""
    return tuple(np.linspace(1.0, 1 / steps, steps).tolist())


def conditioning(config: Mapping[str, Any], batch: int, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """FLUX cannot be sampled by name.

    Raises:
        CompileError: Always; the message says what to do instead.
    """
    raise CompileError(
        "FLUX is conditioned on text embeddings, so that there is no sampling it by name; calibrate with conditioning= of your "
        "own, and run an executable's session step by step with what a FLUX pipeline gives its transformer"
    )


DEV = {"patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
       "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768}  # fmt: skip

FLUX = Family(
    classes=("FluxTransformer2DModel",),
    stacks=(
        Stack("transformer_blocks.*", {"attn": ("attn", "context_attn"), "ff": ("ff",), "ff_context": ("context_ff",)}),
        Stack("single_transformer_blocks.*", {"attn": ("attn",), "act_mlp": ("mlp",), "proj_out": ("proj_out",)}),
    ),
    example_inputs=example_inputs,
    conditioning=conditioning,
    embedding="time_text_embed.timestep_embedder",
    timestep=TimestepInput(("cast", "/1000")),
    random={"flux-dev": {**DEV, "guidance_embeds": True}, "flux-schnell": {**DEV, "guidance_embeds": False}},
    tokens=1,
    unbatched=POSITIONS,
    completed=completed,
    sigmas=sigmas,
    # The published dynamic shift, exp(1.15), at 4096 image tokens.
    scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": math.exp(1.15)}),
)
