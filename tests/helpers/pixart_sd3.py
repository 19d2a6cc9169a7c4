"""Tiny PixArt and SD3 models, their inputs and plans."""

import diffusers
import torch

import stepgraph as sg
from helpers.tiny import tiny_scheduler
from stepgraph.plan import CachePlan

IMAGE, TEXT, WIDTH, STEPS = 16, 5, 32, 4


PIXART = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
          "cross_attention_dim": 32, "sample_size": 8, "patch_size": 2, "caption_channels": 12}  # fmt: skip


SD3 = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 16,
       "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 32, "pooled_projection_dim": 10,
       "out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}  # fmt: skip


def pixart_inputs(batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, TEXT, dtype=torch.int64)
    mask[:, -2:] = 0
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12, generator=generator),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": mask,
    }


def sd3_inputs(batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 10, generator=generator),
        "timestep": torch.full((batch,), 500.0),
    }


def planned(model, inputs, actions: dict[str, str], steps: int = STEPS) -> CachePlan:
    return sg.make_plan(
        "manual", model=model, scheduler=scheduler_of(model), steps=steps, guidance="none", example_inputs=inputs,
        actions=actions,
    )  # fmt: skip


def scheduler_of(model):
    if isinstance(model, diffusers.PixArtTransformer2DModel):
        return tiny_scheduler("dpm++")
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
