"""Tiny random models of diffusers' transformers and inputs for them: videos, from H on."""
# fmt: off

from typing import Any

import torch

from stepgraph.bench.deploy.zoo_draws import Draws, tiny

WAN: dict[str, Any] = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32}
LTX_2: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 2,
    "attention_head_dim": 8, "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4,
    "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 2,
    "caption_channels": 16, "rope_double_precision": False}


@tiny("Kandinsky6Transformer3DModel", {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8,
    "time_dim": 16, "patch_size": (1, 2, 2), "model_dim": 48, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4), "visual_cond": True, "in_audio_dim": 4, "out_audio_dim": 4})
def _kandinsky6(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 2, 4, 4, 9), "encoder_hidden_states": draw.normal(1, 6, 8),
        "pooled_projections": draw.normal(1, 8), "timestep": draw.unit(1) * 1000, "audio_hidden_states": draw.normal(1, 5, 4),
        "encoder_attention_mask": draw.mask(1, 6)}


@tiny("LTX2VideoTransformer3DModel", {**LTX_2})
def _ltx2_video(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 32, 4), "audio_hidden_states": draw.normal(2, 9, 4),
        "encoder_hidden_states": draw.normal(2, 6, 16), "audio_encoder_hidden_states": draw.normal(2, 6, 16),
        "timestep": draw.unit() * 1000, "encoder_attention_mask": draw.mask(2, 6), "num_frames": 2, "height": 4, "width": 4,
        "audio_num_frames": 9, "fps": 25.0}


@tiny("LTXVideoTransformer3DModel", {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
    "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 12})
def _ltx_video(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 32, 4), "encoder_hidden_states": draw.normal(2, 5, 12),
        "timestep": draw.timestep(), "encoder_attention_mask": draw.mask(2, 5), "num_frames": 2, "height": 4, "width": 4}


@tiny("LatteTransformer3DModel", {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
    "num_layers": 2, "cross_attention_dim": 16, "sample_size": 8, "patch_size": 2, "caption_channels": 12, "video_length": 2,
    "attention_bias": True, "norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False, "norm_eps": 1e-06})
def _latte(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 2, 8, 8), "timestep": draw.timestep(), "encoder_hidden_states": draw.normal(2,
        5, 12)}


@tiny("MiniMaxH3Transformer3DModel", {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 2,
    "num_refiner_layers": 2, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 6, "patch_size": (1, 2, 2), "text_dim": 8,
    "freq_dim": 8, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2})
def _mini_max_h3(draw: Draws) -> dict[str, Any]:
    text, audio, video = (3, 2, 8)
    length = text + audio + video
    ti, ai, vi = (torch.arange(text), torch.arange(text, text + audio), torch.arange(text + audio, length))
    tags = torch.empty(length, dtype=torch.long)
    tags[ti] = 1
    tags[ai] = 2
    tags[vi] = 0
    tidx = torch.zeros(length, dtype=torch.long)
    tidx[ai] = 1
    p = torch.zeros(length, 3)
    p[:, 0] = torch.arange(length)
    p[vi, 1] = torch.arange(video) % 4.0
    p[vi, 2] = torch.arange(video) % 2.0
    return {"hidden_states": draw.normal(2, video, 16), "audio_hidden_states": draw.normal(2, audio, 6),
        "encoder_hidden_states": draw.normal(2, text, 8), "timestep": torch.rand(2, generator=draw.generator),
        "timestep_indices": tidx, "token_tags": tags, "position_ids": p, "video_indices": vi, "audio_indices": ai,
        "text_indices": ti}


@tiny("MiniMaxMusic3Transformer1DModel", {"in_channels": 8, "condition_dim": 16, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 8, "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 8})
def _mini_max_music3(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 8, 24), "timestep": draw.unit(1), "encoder_hidden_states": draw.normal(1, 24, 16)}


@tiny("MochiTransformer3DModel", {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
    "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 8})
def _mochi(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 2, 8, 8), "encoder_hidden_states": draw.normal(2, 8, 16),
        "timestep": draw.timestep(), "encoder_attention_mask": draw.mask(2, 8)}


@tiny("MotifVideoTransformer3DModel", {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2,
    "attention_head_dim": 12, "num_layers": 2, "num_single_layers": 2, "num_decoder_layers": 1, "patch_size": 2,
    "patch_size_t": 1, "text_embed_dim": 12, "rope_axes_dim": (4, 4, 4)})
def _motif_video(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 9, 2, 8, 8), "timestep": draw.timestep(1), "encoder_hidden_states": draw.normal(1,
        6, 12), "encoder_attention_mask": draw.mask(1, 6)}


@tiny("SanaVideoTransformer3DModel", {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
    "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
    "caption_channels": 12, "sample_size": 8, "patch_size": (1, 2, 2), "rope_max_seq_len": 32})
def _sana_video(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 4, 2, 8, 8), "encoder_hidden_states": draw.normal(1, 6, 12),
        "timestep": draw.timestep(1), "encoder_attention_mask": draw.mask(1, 6, torch.int64)}


@tiny("SanaWMLTX2RefinerTransformer3DModel", {**LTX_2})
def _sana_wmltx2_refiner(draw: Draws) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2AudioVideoRotaryPosEmbed
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(dim=16, patch_size=1, patch_size_t=1, base_num_frames=20, base_height=2048,
        base_width=2048, scale_factors=(8, 32, 32), modality="video", double_precision=False, num_attention_heads=2)
    emb = rope(rope.prepare_video_coords(2, 2, 4, 4, device="cpu", fps=24.0), device="cpu")
    return {"hidden_states": draw.normal(2, 32, 4), "encoder_hidden_states": draw.normal(2, 8, 16), "timestep": torch.rand(2,
        32, generator=draw.generator) * 1000, "video_rotary_emb": emb, "encoder_attention_mask": draw.mask(2, 8,
        torch.float32)}


@tiny("SanaWMTransformer3DModel", {"in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
    "patch_size": (1, 1, 1), "softmax_every_n": 2, "linear_head_dim": 16, "t_kernel_size": 3, "conv_kernel_size": 4,
    "caption_channels": 8, "mlp_ratio": 2.0, "chunk_plucker_channels": 8, "chunk_plucker_post_attn_blocks": 2})
def _sana_wm(draw: Draws) -> dict[str, Any]:
    c2w = torch.eye(4).repeat(1, 4, 1, 1)
    c2w[..., 2, 3] = torch.arange(4) * 0.1
    k = torch.tensor([8.0, 8.0, 4.0, 4.0]).expand(1, 4, 4)
    return {"hidden_states": draw.normal(1, 4, 4, 8, 8), "timestep": draw.timestep(4).float().reshape(1, 1, 4),
        "encoder_hidden_states": draw.normal(1, 1, 16, 8), "encoder_attention_mask": draw.mask(1, 16, torch.long),
        "camera_conditions": torch.cat([c2w.flatten(-2), k], -1), "chunk_plucker": draw.normal(1, 8, 4, 8, 8)}


@tiny("SkyReelsV2Transformer3DModel", {**WAN})
def _sky_reels_v2(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 4, 2, 8, 8), "timestep": draw.timestep(1), "encoder_hidden_states": draw.normal(1,
        6, 16)}


@tiny("TransformerTemporalModel", {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 8, "num_layers": 2,
    "norm_num_groups": 4})
def _transformer_temporal(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(4, 8, 8, 8), "timestep": draw.timestep(4), "num_frames": 2}


@tiny("WanAnimate2Transformer3DModel", {"patch_size": (1, 2, 2), "text_len": 8, "in_dim": 8, "dim": 32, "ffn_dim": 64,
    "freq_dim": 16, "text_dim": 12, "out_dim": 4, "num_heads": 2, "num_layers": 2, "use_img_emb": True})
def _wan_animate2(draw: Draws) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
    return {"hidden_states": [draw.normal(4, 1, 8, 8)], "timestep": draw.timestep(1).float(),
        "encoder_hidden_states": [draw.normal(5, 12)], "condition_latents": [draw.normal(4, 1, 8, 8)],
        "encoder_hidden_states_image": draw.normal(1, 5, 1280), "kv_cache": WanAnimate2KVCache(2), "kv_cache_mode": "extract",
        "seq_len": 16, "offset_grid_sizes": torch.tensor([[1, 4, 4]])}


@tiny("WanAnimateTransformer3DModel", {**WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 16,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16, "motion_style_dim": 8,
    "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2})
def _wan_animate(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 12, 3, 8, 8), "timestep": draw.timestep(1),
        "encoder_hidden_states": draw.normal(1, 6, 16), "encoder_hidden_states_image": draw.normal(1, 6, 16),
        "pose_hidden_states": draw.normal(1, 4, 2, 8, 8), "face_pixel_values": draw.normal(1, 3, 5, 16, 16)}


@tiny("WanTransformer3DModel", {**WAN})
def _wan(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 4, 2, 8, 8), "timestep": draw.timestep(1), "encoder_hidden_states": draw.normal(1,
        6, 16)}


@tiny("WanVACETransformer3DModel", {**WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 12})
def _wan_vace(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 4, 2, 8, 8), "timestep": draw.timestep(1), "encoder_hidden_states": draw.normal(1,
        6, 16), "control_hidden_states": draw.normal(1, 12, 2, 8, 8)}
