"""Tiny random models of diffusers' transformers and inputs for them: videos and sound, A to H."""
# fmt: off

from typing import Any

import torch

from stepgraph.bench.deploy.zoo_draws import Draws, tiny

WAN: dict[str, Any] = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32}
COGVIDEO: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4,
    "time_embed_dim": 8, "text_embed_dim": 12, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
    "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 6}
HUNYUAN_VIDEO: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10,
    "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1,
    "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)}
JOY: dict[str, Any] = {"patch_size": [1, 2, 2], "in_channels": 16, "hidden_size": 32, "num_attention_heads": 2,
    "text_dim": 16, "num_layers": 2, "rope_dim_list": [4, 6, 6], "theta": 256}


@tiny("AceStepTransformer1DModel", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "in_channels": 24, "audio_acoustic_hidden_dim": 8,
    "patch_size": 2, "rope_theta": 10000.0, "sliding_window": 16})
def _ace_step(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 8, 8), "timestep": draw.unit(), "timestep_r": draw.unit(),
        "encoder_hidden_states": draw.normal(2, 10, 32), "context_latents": draw.normal(2, 8, 16)}


@tiny("AllegroTransformer3DModel", {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
    "num_layers": 2, "cross_attention_dim": 48, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
    "caption_channels": 8})
def _allegro(draw: Draws) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
    freqs_t, freqs_h, freqs_w, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(embed_dim=24, crops_coords=((0, 0),
        (4, 4)), grid_size=(4, 4), temporal_size=2, interpolation_scale=(1.0, 1.0, 1.0))
    pos = torch.cartesian_prod(*(torch.as_tensor(x).long() for x in (grid_t, grid_h, grid_w)))
    grids = tuple(pos.reshape(-1, 3).transpose(0, 1).reshape(3, 1, -1).contiguous())
    return {"hidden_states": draw.normal(2, 4, 2, 8, 8), "encoder_hidden_states": draw.normal(2, 6, 8),
        "timestep": draw.timestep(), "attention_mask": torch.ones(2, 2, 8, 8), "encoder_attention_mask": draw.mask(2, 6,
        torch.float32), "image_rotary_emb": ((freqs_t, freqs_h, freqs_w), grids)}


@tiny("AnyFlowTransformer3DModel", {**{k: v for k, v in WAN.items() if k != "qk_norm"}, "gate_value": 0.25,
    "deltatime_type": "r"})
def _any_flow(draw: Draws) -> dict[str, Any]:
    t = draw.timestep(1).float()
    return {"hidden_states": draw.normal(1, 2, 4, 8, 8), "timestep": t[:, None].expand(1, 2).clone(), "r_timestep": (t / 2)[:,
        None].expand(1, 2).clone(), "encoder_hidden_states": draw.normal(1, 6, 16)}


@tiny("AnyFlowFARTransformer3DModel", {**{k: v for k, v in WAN.items() if k != "qk_norm"}, "compressed_patch_size": (1, 4, 4),
    "full_chunk_limit": 3, "gate_value": 0.25, "deltatime_type": "r"})
def _any_flow_far(draw: Draws) -> dict[str, Any]:
    t = draw.timestep(1).float()
    return {"hidden_states": draw.normal(1, 4, 4, 16, 16), "timestep": t[:, None].expand(1, 4).clone(), "r_timestep": (t /
        2)[:, None].expand(1, 4).clone(), "encoder_hidden_states": draw.normal(1, 6, 16), "chunk_partition": [2, 2]}


@tiny("ChronoEditTransformer3DModel", {**WAN, "rope_temporal_skip_len": 8})
def _chrono_edit(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 4, 2, 8, 8), "timestep": draw.timestep(1), "encoder_hidden_states": draw.normal(1,
        6, 16)}


@tiny("CogVideoXTransformer3DModel", {**COGVIDEO})
def _cog_video_x(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 2, 4, 8, 8), "encoder_hidden_states": draw.normal(2, 6, 12),
        "timestep": draw.timestep()}


@tiny("ConsisIDTransformer3DModel", {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4,
    "time_embed_dim": 2, "text_embed_dim": 8, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
    "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 8, "cross_attn_interval": 1, "is_kps": False,
    "is_train_face": True, "cross_attn_dim_head": 1, "cross_attn_num_heads": 1, "LFE_id_dim": 2, "LFE_vit_dim": 2,
    "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 10,
    "LFE_ff_mult": 1, "LFE_num_scale": 1})
def _consis_id(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 1, 4, 8, 8), "encoder_hidden_states": draw.normal(2, 8, 8),
        "timestep": draw.timestep(), "id_vit_hidden": [draw.normal(2, 2, 2)], "id_cond": draw.normal(2, 2)}


@tiny("CosmosTransformer3DModel", {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
    "num_layers": 2, "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2,
    2), "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": True, "extra_pos_embed_type": "learnable"})
def _cosmos(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 4, 1, 16, 16), "timestep": draw.timestep(1),
        "encoder_hidden_states": draw.normal(1, 6, 16), "attention_mask": draw.mask(1, 6), "fps": 30,
        "padding_mask": torch.zeros(1, 1, 16, 16)}


@tiny("EasyAnimateTransformer3DModel", {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4,
    "mmdit_layers": 2, "num_layers": 2, "out_channels": 4, "patch_size": 2, "sample_height": 60, "sample_width": 90,
    "text_embed_dim": 16, "time_embed_dim": 8})
def _easy_animate(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(2, 4, 2, 16, 16), "timestep": draw.timestep(),
        "encoder_hidden_states": draw.normal(2, 6, 16)}


@tiny("HeliosTransformer3DModel", {**{k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)})
def _helios(draw: Draws) -> dict[str, Any]:
    o = torch.ones
    return {"hidden_states": draw.normal(1, 4, 2, 16, 16), "timestep": draw.timestep(1),
        "encoder_hidden_states": draw.normal(1, 6, 16), "indices_hidden_states": o(1, 2),
        "indices_latents_history_short": o(1, 1), "indices_latents_history_mid": o(1, 1), "indices_latents_history_long": o(1,
        4), "latents_history_short": draw.normal(1, 4, 1, 16, 16), "latents_history_mid": draw.normal(1, 4, 1, 16, 16),
        "latents_history_long": draw.normal(1, 4, 4, 16, 16)}


@tiny("HunyuanVideo15Transformer3DModel", {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
    "attention_head_dim": 8, "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1, "patch_size_t": 1,
    "text_embed_dim": 12, "text_embed_2_dim": 10, "image_embed_dim": 6, "rope_axes_dim": (2, 2, 4), "target_size": 16,
    "task_type": "t2v"})
def _hunyuan_video15(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 4, 1, 8, 8), "timestep": draw.unit(1) * 1000,
        "encoder_hidden_states": draw.normal(1, 6, 12), "encoder_attention_mask": draw.mask(1, 6, torch.float32),
        "encoder_hidden_states_2": draw.normal(1, 4, 10), "encoder_attention_mask_2": draw.mask(1, 4, torch.float32),
        "image_embeds": torch.zeros(1, 3, 6)}


@tiny("HunyuanVideoTransformer3DModel", {**HUNYUAN_VIDEO})
def _hunyuan_video(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 4, 2, 8, 8), "timestep": draw.unit(1) * 1000,
        "encoder_hidden_states": draw.normal(1, 6, 16), "encoder_attention_mask": draw.mask(1, 6, torch.float32),
        "pooled_projections": draw.normal(1, 8), "guidance": draw.unit(1) * 6000}


@tiny("HunyuanVideoFramepackTransformer3DModel", {**HUNYUAN_VIDEO, "has_image_proj": True, "image_proj_dim": 16,
    "has_clean_x_embedder": True})
def _hunyuan_video_framepack(draw: Draws) -> dict[str, Any]:
    o = torch.ones
    return {"hidden_states": draw.normal(1, 4, 3, 4, 4), "timestep": draw.timestep(1), "encoder_hidden_states": draw.normal(1,
        6, 16), "encoder_attention_mask": draw.mask(1, 6, torch.float32), "pooled_projections": draw.normal(1, 8),
        "image_embeds": draw.normal(1, 6, 16), "indices_latents": o(3), "guidance": draw.unit(1) * 6000,
        "latents_clean": draw.normal(1, 4, 2, 4, 4), "indices_latents_clean": o(2), "latents_history_2x": draw.normal(1, 4, 2,
        4, 4), "indices_latents_history_2x": o(2), "latents_history_4x": draw.normal(1, 4, 8, 4, 4),
        "indices_latents_history_4x": o(8)}


@tiny("JoyImageEditTransformer3DModel", {**JOY})
def _joy_image_edit(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 16, 1, 4, 4), "encoder_hidden_states": draw.normal(1, 6, 16),
        "timestep": draw.unit(1)}


@tiny("JoyImageEditPlusTransformer3DModel", {**JOY})
def _joy_image_edit_plus(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 2, 16, 1, 2, 2), "encoder_hidden_states": draw.normal(1, 6, 16),
        "timestep": draw.unit(1), "shape_list": [[(1, 1, 1), (1, 1, 1)]]}


@tiny("Kandinsky5Transformer3DModel", {"in_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 8, "time_dim": 16,
    "out_visual_dim": 4, "patch_size": (1, 2, 2), "model_dim": 48, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4)})
def _kandinsky5(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 2, 8, 8, 4), "encoder_hidden_states": draw.normal(1, 5, 12),
        "timestep": draw.unit(1) * 1000, "pooled_projections": draw.normal(1, 8), "visual_rope_pos": [torch.arange(2),
        torch.arange(4), torch.arange(4)], "text_rope_pos": torch.arange(5)}


@tiny("Kandinsky6SRTransformer3DModel", {"in_visual_dim": 4, "out_visual_dim": 8, "time_dim": 16, "patch_size": (1, 2, 2),
    "model_dim": 24, "ff_dim": 32, "num_visual_blocks": 2, "axes_dims": (4, 4, 4)})
def _kandinsky6_sr(draw: Draws) -> dict[str, Any]:
    return {"hidden_states": draw.normal(1, 2, 16, 16, 9), "timestep": draw.unit(1) * 1000}
