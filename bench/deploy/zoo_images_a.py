"""Tiny random models of diffusers' transformers and inputs for them: images, A to K."""
# fmt: off

from typing import Any

import torch

from stepgraph.bench.deploy.zoo_draws import Draws, positions, tiny

FLUX: dict[str, Any] = {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (4, 4, 8)}


@tiny("AuraFlowTransformer2DModel", {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2,
    "num_single_dit_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16,
    "joint_attention_dim": 12, "out_channels": 4, "pos_embed_max_size": 16})
def _aura_flow(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "encoder_hidden_states": draw.normal(2, 5, 12), "timestep": draw.unit()}


@tiny("BriaFibo2Transformer2DModel", {"in_channels": 4, "patch_size": 2, "dim": 32, "n_layers": 2, "n_refiner_layers": 1,
    "n_heads": 2, "cap_feat_dim": 24, "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4,
    "max_num_gist_tokens": 8, "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": (4, 6, 6),
    "axes_lens": (16, 16, 16)})
def _bria_fibo2(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 4, 8, 8), "timestep": draw.unit(1), "encoder_hidden_states": draw.normal(1, 2, 6,
        24)}


@tiny("BriaFiboTransformer2DModel", {**FLUX, "text_encoder_dim": 6, "pooled_projection_dim": None})
def _bria_fibo(draw: Draws) -> dict[str, Any]:
    e = draw.normal(1, 5, 12)
    return {"hidden_states": draw.normal(1, 16, 4), "encoder_hidden_states": e, "img_ids": positions(4, 4),
        "txt_ids": torch.zeros(5, 3), "timestep": draw.unit(1), "text_encoder_layers": [e[:, :,
        :6].clone() for _ in range(4)]}


@tiny("BriaTransformer2DModel", {**FLUX, "pooled_projection_dim": None})
def _bria(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 16, 4), "encoder_hidden_states": draw.normal(1, 5, 12), "img_ids": positions(4,
        4), "txt_ids": torch.zeros(5, 3), "timestep": draw.unit(1)}


@tiny("ChromaTransformer2DModel", {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16,
    "approximator_layers": 1})
def _chroma(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 16, 4), "encoder_hidden_states": draw.normal(1, 5, 12), "img_ids": positions(4,
        4), "txt_ids": torch.zeros(5, 3), "timestep": draw.unit(1), "attention_mask": torch.cat([draw.mask(1, 5),
        torch.ones(1, 16, dtype=torch.bool)], 1)}


@tiny("CogView3PlusTransformer2DModel", {"patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "out_channels": 4, "text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4,
    "pos_embed_max_size": 8, "sample_size": 8})
def _cog_view3_plus(draw: Draws) -> dict[str, Any]:
    z = torch.tensor([[64.0, 64.0]] * 2)
    return {"hidden_states": draw.normal(2, 4, 8, 8), "encoder_hidden_states": draw.normal(2, 5, 12),
        "timestep": draw.timestep(), "original_size": z, "target_size": z.clone(), "crop_coords": torch.zeros(2, 2)}


@tiny("CogView4Transformer2DModel", {"patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "out_channels": 4, "text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4,
    "rope_axes_dim": (8, 8), "sample_size": 8})
def _cog_view4(draw: Draws) -> dict[str, Any]:
    z = torch.tensor([[64.0, 64.0]] * 2)
    return {"hidden_states": draw.normal(2, 4, 8, 8), "encoder_hidden_states": draw.normal(2, 5, 12),
        "timestep": draw.timestep(), "original_size": z, "target_size": z.clone(), "crop_coords": torch.zeros(2, 2)}


@tiny("DiTTransformer2DModel", {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
    "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10})
def _di_t(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "timestep": draw.timestep(), "class_labels": draw.whole(10, 2)}


@tiny("DreamLiteTransformer2DModel", {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 8, "num_layers": 2,
    "norm_num_groups": 4, "cross_attention_dim": 12})
def _dream_lite(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 8, 8, 8), "encoder_hidden_states": draw.normal(2, 5, 12),
        "timestep": draw.timestep(), "encoder_attention_mask": draw.mask(2, 5)}


@tiny("ErnieImageTransformer2DModel", {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32,
    "in_channels": 16, "out_channels": 16, "patch_size": 1, "text_in_dim": 16, "rope_axes_dim": (8, 4, 4)})
def _ernie_image(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 16, 4, 4), "timestep": draw.unit(), "text_bth": draw.normal(2, 6, 16),
        "text_lens": torch.tensor([6, 3 + draw.seed % 3])}


@tiny("Flux2Transformer2DModel", {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12, "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4)})
def _flux2(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 16, 4), "encoder_hidden_states": draw.normal(2, 5, 12), "img_ids": positions(4, 4,
        4)[None].repeat(2, 1, 1), "txt_ids": torch.zeros(2, 5, 4), "timestep": draw.unit(), "guidance": draw.unit() * 4}


@tiny("Flux3Transformer2DModel", {"in_channels": 4, "cond_in_channels": 4, "num_layers": 2, "num_single_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12, "timestep_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4)})
def _flux3(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 16, 4), "encoder_hidden_states": draw.normal(2, 5, 12), "timestep": draw.unit(),
        "img_ids": positions(4, 4, 4), "txt_ids": torch.zeros(5, 4)}


@tiny("FluxTransformer2DModel", {**FLUX, "pooled_projection_dim": 10, "guidance_embeds": True})
def _flux(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 16, 4), "encoder_hidden_states": draw.normal(2, 5, 12),
        "pooled_projections": draw.normal(2, 10), "timestep": draw.unit(), "img_ids": positions(4, 4),
        "txt_ids": torch.zeros(5, 3), "guidance": draw.unit() * 4}


@tiny("GlmImageTransformer2DModel", {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 8, "num_attention_heads": 2, "text_embed_dim": 12, "time_embed_dim": 16, "condition_dim": 8,
    "prior_vq_quantizer_codebook_size": 64})
def _glm_image(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "encoder_hidden_states": draw.normal(2, 5, 12),
        "prior_token_id": draw.whole(64, 2, 16), "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
        "timestep": draw.timestep(), "target_size": torch.tensor([[64.0, 64.0]] * 2), "crop_coords": torch.zeros(2, 2)}


@tiny("HiDreamImageTransformer2DModel", {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [8, 4], "text_emb_dim": 8,
    "num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32),
    "llama_layers": (0, 1, 0, 1), "force_inference_output": True})
def _hi_dream_image(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 32, 32), "timesteps": draw.timestep(),
        "encoder_hidden_states_t5": draw.normal(2, 8, 8), "encoder_hidden_states_llama3": draw.normal(2, 2, 8, 4),
        "pooled_embeds": draw.normal(2, 8)}
