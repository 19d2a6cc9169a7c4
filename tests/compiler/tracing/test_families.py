"""Tracing other diffusers transformers: bound to the model, the graph gives what the model gives."""

import diffusers
import pytest
import torch
from torch.utils import _pytree as pytree

from stepgraph.compiler.tracing.trace import trace


def randn(*shape):
    return torch.randn(*shape)


def step(batch=1):
    return torch.full((batch,), 7)


# class -> (tiny configuration, makes inputs)
FAMILIES = {
    "PixArtTransformer2DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "cross_attention_dim": 16, "sample_size": 8, "patch_size": 2, "caption_channels": 12},
        lambda: {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 5, 12), "timestep": step(2),
                 "encoder_attention_mask": torch.ones(2, 5), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "SD3Transformer2DModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10,
         "out_channels": 4, "pos_embed_max_size": 8},
        lambda: {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 5, 12),
                 "pooled_projections": randn(2, 10), "timestep": step(2)},
    ),
    "FluxTransformer2DModel": (
        {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": [4, 4, 8],
         "guidance_embeds": True},
        lambda: {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 5, 12),
                 "pooled_projections": randn(1, 10), "timestep": torch.tensor([0.7]), "guidance": torch.tensor([3.5]),
                 "img_ids": randn(16, 3), "txt_ids": torch.zeros(5, 3)},
    ),
    "WanTransformer3DModel": (
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
         "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
         "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32},
        lambda: {"hidden_states": randn(1, 4, 2, 8, 8), "timestep": step(), "encoder_hidden_states": randn(1, 5, 16)},
    ),
    "CogVideoXTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
         "text_embed_dim": 12, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5, "patch_size": 2,
         "temporal_compression_ratio": 4, "max_text_seq_length": 6},
        lambda: {"hidden_states": randn(1, 2, 4, 8, 8), "encoder_hidden_states": randn(1, 6, 12), "timestep": step()},
    ),
    "CogView4Transformer2DModel": (
        {"patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "out_channels": 4, "text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4,
         "rope_axes_dim": (8, 8), "sample_size": 8},
        lambda: {"hidden_states": randn(1, 4, 8, 8), "encoder_hidden_states": randn(1, 5, 12), "timestep": step(),
                 "original_size": torch.tensor([[64.0, 64.0]]), "target_size": torch.tensor([[64.0, 64.0]]),
                 "crop_coords": torch.zeros(1, 2)},
    ),
    "LTXVideoTransformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
         "num_layers": 2, "caption_channels": 12},
        lambda: {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 5, 12), "timestep": step(),
                 "encoder_attention_mask": torch.ones(1, 5), "num_frames": 1, "height": 4, "width": 4,
                 "rope_interpolation_scale": (1.0, 1.0, 1.0)},
    ),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 12,
         "out_channels": 4, "pos_embed_max_size": 16},
        lambda: {"hidden_states": randn(1, 4, 8, 8), "encoder_hidden_states": randn(1, 5, 12), "timestep": torch.tensor([0.5])},
    ),
    "SanaTransformer2DModel": (
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12,
         "sample_size": 8, "patch_size": 1},
        lambda: {"hidden_states": randn(1, 4, 8, 8), "encoder_hidden_states": randn(1, 5, 12), "timestep": step()},
    ),
    "LatteTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1,
         "cross_attention_dim": 16, "sample_size": 8, "patch_size": 2, "caption_channels": 12, "video_length": 2,
         "attention_bias": True, "norm_type": "ada_norm_single", "activation_fn": "gelu-approximate",
         "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False, "norm_eps": 1e-6},
        lambda: {"hidden_states": randn(1, 4, 2, 8, 8), "timestep": step(), "encoder_hidden_states": randn(1, 5, 12)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_traced_family_is_exact(name):
    config, make_inputs = FAMILIES[name]
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval()
    traced = trace(model, make_inputs())
    given = make_inputs()
    with torch.no_grad():
        wanted = pytree.tree_leaves(model(**given))
        got = traced.bind(model)(*(given[key] for key in traced.inputs))
    assert len(got) == len(wanted) == 1
    assert torch.isfinite(wanted[0]).all()
    assert torch.equal(got[0], wanted[0])
