"""PixArt: text-to-image transformers with cross-attention (arXiv 2310.00426; diffusers' PixArtTransformer2DModel).

A block adds its self-attention and its MLP through gates, which it takes from one modulation of the whole model and a table of
its own (adaLN-single); the cross-attention to the text stands between the two and is added without a gate.
"""

from collections.abc import Mapping
from typing import Any

import torch

from stepgraph.compiler.interfaces.family import Family, Stack
from stepgraph.errors import CompileError

# Text tokens that PixArt-alpha was trained with. The configuration does not say.
TEXT = 120


def example_inputs(config: Mapping[str, Any], batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Latents [B, C, H, W] and text embeddings [B, 120, D] in `dtype`, timestep [B] and text mask [B, 120] int64.

    Models conditioned on the size of the image also take `added_cond_kwargs`: height and width in pixels [B, 2] and their
    ratio [B, 1], in `dtype`.
    """
    size, sized = config["sample_size"], config["use_additional_conditions"]
    # diffusers' own rule where the configuration does not say: models for 1024 x 1024 pixels.
    sized = sized or (sized is None and size == 128)
    text = config["caption_channels"] or config["cross_attention_dim"]
    inputs: dict[str, Any] = {
        "hidden_states": torch.zeros(batch, config["in_channels"], size, size, dtype=dtype, device=device),
        "encoder_hidden_states": torch.zeros(batch, TEXT, text, dtype=dtype, device=device),
        "timestep": torch.zeros(batch, dtype=torch.int64, device=device),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.int64, device=device),
    }
    if sized:
        # The latents are an eighth of the image in size.
        pixels = torch.full((batch, 2), 8.0 * size, dtype=dtype, device=device)
        inputs["added_cond_kwargs"] = {"resolution": pixels, "aspect_ratio": torch.ones_like(pixels[:, :1])}
    return inputs


def conditioning(config: Mapping[str, Any], batch: int, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """PixArt cannot be sampled by name.

    Raises:
        CompileError: Always; the message says what to do instead.
    """
    raise CompileError(
        "PixArt is conditioned on text embeddings, so that there is no sampling it by name; calibrate with conditioning= of "
        "your own, and run an executable's session step by step with what a PixArt pipeline gives its transformer"
    )


# PixArt-XL-2-512x512.
ALPHA = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
         "cross_attention_dim": 1152, "sample_size": 64, "patch_size": 2, "caption_channels": 4096,
         "use_additional_conditions": False}  # fmt: skip

PIXART = Family(
    classes=("PixArtTransformer2DModel",),
    stacks=(Stack("transformer_blocks.*", {"attn1": ("attn",), "attn2": ("cross_attn",), "ff": ("ff",)}, streams=True),),
    example_inputs=example_inputs,
    conditioning=conditioning,
    embedding="adaln_single.emb.timestep_embedder",
    random={"pixart-alpha": ALPHA},
    optional=frozenset(("encoder_attention_mask",)),
    scheduler=("DPMSolverMultistepScheduler", {}),
)
