"""U-ViT: transformers with long skip connections (arXiv 2209.12152; diffusers' UTransformer2DModel).

diffusers keeps the trunk only: patches in, normalised tokens out. In the class-conditional models of the paper the caller
prepends one token each for time and class and puts an output head behind; here the forward takes a timestep and leaves it
alone. There are no `block` sites: the later half reads the outputs of the earlier one, so that a reused block does not stand
for everything before it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from stepgraph.compiler.interfaces.family import Family, Stack


def example_inputs(config: Mapping[str, Any], batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Latents [B, C, H, W] in `dtype` and timestep [B] int64."""
    size = config["sample_size"]
    return {
        "hidden_states": torch.zeros(batch, config["in_channels"], size, size, dtype=dtype, device=device),
        "timestep": torch.zeros(batch, dtype=torch.int64, device=device),
    }


def conditioning(config: Mapping[str, Any], batch: int, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nothing: the trunk takes its conditioning as tokens."""
    return {}, {}


VALUES = {"attn1": ("attn",), "attn2": ("cross_attn",), "ff": ("ff",)}

# U-ViT-H/2 for latents of 32 x 32: 29 blocks of width 1152. The trunk unpatchifies its tokens, hence 1152 / (2 * 2) channels.
H_2 = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 288, "num_layers": 28,
       "sample_size": 32, "patch_size": 2, "activation_fn": "gelu", "block_type": "pre_norm", "pre_layer_norm": True,
       "use_patch_pos_embed": True}  # fmt: skip

UVIT = Family(
    classes=("UTransformer2DModel",),
    stacks=(
        Stack("transformer_in_blocks.*", VALUES),
        Stack("transformer_mid_block", VALUES),
        Stack("transformer_out_blocks.*.block", VALUES),
    ),
    example_inputs=example_inputs,
    conditioning=conditioning,
    random={"uvit-h-2": H_2},
    module="diffusers.pipelines.deprecated.unidiffuser.modeling_uvit",
    scheduler=("DPMSolverSinglestepScheduler", {"solver_order": 2, "lower_order_final": True}),
)
