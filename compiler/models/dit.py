"""DiT: class-conditional latent diffusion transformers (diffusers' DiTTransformer2DModel)."""

from collections.abc import Mapping
from typing import Any

import torch

from stepgraph.compiler.interfaces.family import Family, Stack


def example_inputs(config: Mapping[str, Any], batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Latents [B, C, H, W] in `dtype`, timestep [B] int64 and class labels [B] int64."""
    size = config["sample_size"]
    return {
        "hidden_states": torch.zeros(batch, config["in_channels"], size, size, dtype=dtype, device=device),
        "timestep": torch.zeros(batch, dtype=torch.int64, device=device),
        "class_labels": torch.zeros(batch, dtype=torch.int64, device=device),
    }


def conditioning(config: Mapping[str, Any], batch: int, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Class labels 0, 1, 2, ... in turn, and the null class for the unconditional half."""
    classes = config["num_embeds_ada_norm"]
    labels = torch.arange(batch, device=device) % classes
    return {"class_labels": labels}, {"class_labels": torch.full_like(labels, classes)}


XL_2 = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
        "patch_size": 2, "num_embeds_ada_norm": 1000}  # fmt: skip

DIT = Family(
    classes=("DiTTransformer2DModel",),
    stacks=(Stack("transformer_blocks.*", {"attn1": ("attn",), "ff": ("ff",)}, streams=True),),
    example_inputs=example_inputs,
    conditioning=conditioning,
    embedding="transformer_blocks.0.norm1.emb.timestep_embedder",
    random={"dit-xl-2-256": {**XL_2, "sample_size": 32}, "dit-xl-2-512": {**XL_2, "sample_size": 64}},
)
