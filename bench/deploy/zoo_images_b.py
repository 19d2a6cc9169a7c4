"""Tiny random models of diffusers' transformers and inputs for them: images, from K on."""
# fmt: off

from typing import Any

import torch

from stepgraph.bench.deploy.zoo_draws import Draws, positions, tiny

FLUX: dict[str, Any] = {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (4, 4, 8)}


@tiny("HunyuanImageTransformer2DModel", {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
    "attention_head_dim": 8, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0,
    "patch_size": (1, 1), "text_embed_dim": 12, "text_embed_2_dim": 10, "rope_axes_dim": (4, 4)})
def _hunyuan_image(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "timestep": draw.unit() * 1000, "encoder_hidden_states": draw.normal(2,
        6, 12), "encoder_attention_mask": draw.mask(2, 6), "encoder_hidden_states_2": draw.normal(2, 4, 10),
        "encoder_attention_mask_2": draw.mask(2, 4)}


@tiny("Ideogram4Transformer2DModel", {"in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 12, "rope_theta": 10000, "mrope_section": (4, 2, 2)})
def _ideogram4(draw: Draws) -> dict[str, Any]:
    from diffusers.models.transformers import transformer_ideogram4 as m
    text, image = (4, 4)
    length = text + image
    x = torch.zeros(1, length, 4)
    x[:, text:] = draw.normal(1, image, 4)
    e = torch.zeros(1, length, 12)
    e[:, :text] = draw.normal(1, text, 12)
    p = torch.zeros(1, length, 3, dtype=torch.long)
    p[:, :text] = torch.arange(text)[:, None]
    p[:, text:, 1] = torch.tensor([0, 0, 1, 1])
    p[:, text:, 2] = torch.tensor([0, 1, 0, 1])
    ind = torch.empty(1, length, dtype=torch.long)
    ind[:, :text] = m.LLM_TOKEN_INDICATOR
    ind[:, text:] = m.OUTPUT_IMAGE_INDICATOR
    return {"hidden_states": x, "timestep": draw.unit(1), "encoder_hidden_states": e, "position_ids": p,
        "segment_ids": torch.ones(1, length, dtype=torch.long), "indicator": ind}


@tiny("Krea2Transformer2DModel", {"in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 8, "num_text_layers": 3,
    "text_num_attention_heads": 2, "text_num_key_value_heads": 1, "text_intermediate_size": 16,
    "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 2, 2)})
def _krea2(draw: Draws) -> dict[str, Any]:
    p = torch.zeros(5 + 16, 3)
    p[5:] = positions(4, 4)
    m = torch.ones(1, 5, dtype=torch.bool)
    m[:, -1 - draw.seed % 2:] = False
    return {"hidden_states": draw.normal(1, 16, 4), "encoder_hidden_states": draw.normal(1, 5, 3, 8),
        "timestep": draw.unit(1), "position_ids": p, "encoder_attention_mask": m}


@tiny("LongCatImageTransformer2DModel", {**FLUX, "pooled_projection_dim": 10})
def _long_cat_image(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 16, 4), "encoder_hidden_states": draw.normal(2, 5, 12), "img_ids": positions(4,
        4), "txt_ids": torch.zeros(5, 3), "timestep": draw.unit(), "guidance": draw.unit() * 4}


@tiny("Lumina2Transformer2DModel", {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
    "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2),
    "axes_lens": (64, 32, 32), "cap_feat_dim": 12})
def _lumina2(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "timestep": draw.unit(), "encoder_hidden_states": draw.normal(2, 6, 12),
        "encoder_attention_mask": draw.mask(2, 6)}


@tiny("NucleusMoEImageTransformer2DModel", {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 4,
    "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4),
    "moe_enabled": True, "dense_moe_strategy": "leave_first_three_and_last_block_dense", "num_experts": 4,
    "moe_intermediate_dim": 16, "capacity_factors": [2.0] * 4})
def _nucleus_mo_e_image(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 16, 16), "encoder_hidden_states": draw.normal(2, 8, 16),
        "encoder_hidden_states_mask": draw.mask(2, 8, torch.long), "timestep": draw.unit(), "img_shapes": [(1, 4, 4)] * 2}


@tiny("OmniGenTransformer2DModel", {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 32, "num_layers": 2, "pad_token_id": 0, "vocab_size": 100, "in_channels": 4, "time_step_dim": 4,
    "rope_scaling": {"long_factor": list(range(1, 3)), "short_factor": list(range(1, 3))}})
def _omni_gen(draw: Draws) -> dict[str, Any]:
    n, h = (24, 8)
    length = n + 1 + 16
    return {"hidden_states": draw.normal(2, 4, h, h), "timestep": draw.unit(), "input_ids": draw.whole(10, 2, n),
        "input_img_latents": [draw.normal(1, 4, h, h)], "input_image_sizes": {0: [[0, 16]]}, "attention_mask": torch.ones(2,
        length, length), "position_ids": torch.arange(length)[None].repeat(2, 1)}


@tiny("OvisImageTransformer2DModel", {**FLUX, "out_channels": 4})
def _ovis_image(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 16, 4), "encoder_hidden_states": draw.normal(2, 5, 12), "img_ids": positions(4,
        4), "txt_ids": torch.zeros(5, 3), "timestep": draw.unit()}


@tiny("PRXTransformer2DModel", {"in_channels": 4, "patch_size": 2, "context_in_dim": 12, "hidden_size": 32, "mlp_ratio": 2.0,
    "num_heads": 2, "depth": 2, "axes_dim": [8, 8]})
def _prx(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "timestep": draw.unit(), "encoder_hidden_states": draw.normal(2, 5, 12),
        "attention_mask": draw.mask(2, 5)}


@tiny("PixArtTransformer2DModel", {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
    "num_layers": 2, "cross_attention_dim": 16, "sample_size": 8, "patch_size": 2, "caption_channels": 12,
    "use_additional_conditions": False})
def _pix_art(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "encoder_hidden_states": draw.normal(2, 5, 12),
        "timestep": draw.timestep(), "encoder_attention_mask": draw.mask(2, 5, torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


@tiny("QwenImage21Transformer2DModel", {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "context_in_dim": 8, "mlp_ratio": 2, "axes_dims_rope": (4, 6, 6)})
def _qwen_image21(draw: Draws) -> dict[str, Any]:
    text = 4
    m = torch.zeros(1, text + 1, dtype=torch.bool)
    m[:, text:] = True
    return {"hidden_states": draw.normal(1, 4, 4), "encoder_hidden_states": draw.normal(1, text, 8),
        "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.long), "timestep": draw.unit(1), "img_shapes": [[(1, 2,
        2)]], "img_mask": m}


@tiny("QwenImageTransformer2DModel", {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (8, 4, 4)})
def _qwen_image(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 16, 16), "encoder_hidden_states": draw.normal(2, 8, 12),
        "encoder_hidden_states_mask": draw.mask(2, 8, torch.long), "timestep": draw.unit(), "img_shapes": [(1, 4, 4)] * 2}


@tiny("SD3Transformer2DModel", {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10,
    "out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"})
def _sd3(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "encoder_hidden_states": draw.normal(2, 5, 12),
        "pooled_projections": draw.normal(2, 10), "timestep": draw.timestep().float()}


@tiny("SanaTransformer2DModel", {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
    "caption_channels": 12, "sample_size": 8, "patch_size": 1})
def _sana(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "encoder_hidden_states": draw.normal(2, 5, 12),
        "timestep": draw.timestep(), "encoder_attention_mask": draw.mask(2, 5, torch.int64)}


@tiny("Transformer2DModel", {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 8, "num_layers": 2,
    "norm_num_groups": 4, "cross_attention_dim": 12})
def _transformer(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 8, 8, 8), "encoder_hidden_states": draw.normal(2, 5, 12),
        "timestep": draw.timestep()}


@tiny("ZImageTransformer2DModel", {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 16,
    "n_layers": 2, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1, "qk_norm": True, "cap_feat_dim": 12,
    "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]})
def _z_image(draw: Draws) -> dict[str, Any]:
    return {"x": [draw.normal(4, 1, 8, 8) for _ in range(2)], "t": draw.unit(), "cap_feats": [draw.normal(6,
        12) for _ in range(2)]}
