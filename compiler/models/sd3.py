"""Stable Diffusion 3: text-to-image transformers of joint blocks (arXiv 2403.03206; diffusers' SD3Transformer2DModel).

A block keeps image and text tokens apart and joins them in one attention with two outputs; in SD3.5 the first blocks have a
second attention, over the image alone. The last block hands on no text: its attention's text output goes nowhere and is no
site. There are no `block` sites: a block hands on two streams, and one reused value cannot stand for them.
"""

from collections.abc import Mapping
from typing import Any

import torch

from stepgraph.compiler.interfaces.family import Family, Stack
from stepgraph.errors import CompileError

# Tokens of the two CLIP encoders (77) and of T5 (256), one behind the other. The configuration does not say.
TEXT = 77 + 256


def example_inputs(config: Mapping[str, Any], batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Latents [B, C, H, W], text embeddings [B, 333, D] and pooled text [B, P] in `dtype`, timestep [B] float32."""
    size = config["sample_size"]
    return {
        "hidden_states": torch.zeros(batch, config["in_channels"], size, size, dtype=dtype, device=device),
        "encoder_hidden_states": torch.zeros(batch, TEXT, config["joint_attention_dim"], dtype=dtype, device=device),
        "pooled_projections": torch.zeros(batch, config["pooled_projection_dim"], dtype=dtype, device=device),
        "timestep": torch.zeros(batch, dtype=torch.float32, device=device),
    }


def conditioning(config: Mapping[str, Any], batch: int, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """SD3 cannot be sampled by name.

    Raises:
        CompileError: Always; the message says what to do instead.
    """
    raise CompileError(
        "SD3 is conditioned on text embeddings, so that there is no sampling it by name; calibrate with conditioning= of your "
        "own, and run an executable's session step by step with what an SD3 pipeline gives its transformer"
    )


MEDIUM = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
          "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
          "pooled_projection_dim": 2048, "pos_embed_max_size": 192}  # fmt: skip

VALUES = {"attn": ("attn", "context_attn"), "attn2": ("attn",), "ff": ("ff",), "ff_context": ("context_ff",)}

SD3 = Family(
    classes=("SD3Transformer2DModel",),
    stacks=(Stack("transformer_blocks.*", VALUES),),
    example_inputs=example_inputs,
    conditioning=conditioning,
    embedding="time_text_embed.timestep_embedder",
    random={"sd3-medium": MEDIUM},
    # The last of a block's outputs: image behind text, or alone.
    tokens=-1,
    scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
)
