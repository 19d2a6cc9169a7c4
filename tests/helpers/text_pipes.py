"""Real FLUX and SD3 pipelines around tiny transformers, called with prompt embeddings; their results are latents."""

import diffusers
import torch

from helpers.families import FLUX
from helpers.pixart_sd3 import SD3

TEXT = 5
# FLUX.1-dev's own scheduler.
DYNAMIC = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0,
           "use_dynamic_shifting": True}  # fmt: skip


def tiny_vae(channels: int):
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=8,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), shift_factor=0.0,
    ).eval()  # fmt: skip


def flux_pipe(kind=diffusers.FluxPipeline, scheduler=None, dtype=torch.float32):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(**FLUX).eval().to(dtype)
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    made = kind(scheduler, tiny_vae(1).to(dtype), None, None, None, None, transformer)
    made.set_progress_bar_config(disable=True)
    return made


def sd3_pipe(kind=diffusers.StableDiffusion3Pipeline, scheduler=None):
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(**SD3).eval()
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = tiny_vae(4)
    made = kind(transformer, scheduler, vae, None, None, None, None, None, None)
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipe, seed: int = 0, guidance_scale: float = 1.0, side: int = 8, text: int = TEXT, **arguments) -> torch.Tensor:
    """A call with prompt embeddings, of the transformer's dtype."""
    generator, dtype = torch.Generator().manual_seed(seed), pipe.transformer.dtype
    prompt = {
        "prompt_embeds": torch.randn(1, text, 12, generator=generator).to(dtype),
        "pooled_prompt_embeds": torch.randn(1, 10, generator=generator).to(dtype),
    }
    if isinstance(pipe, (diffusers.StableDiffusion3Pipeline, diffusers.StableDiffusion3Img2ImgPipeline)):
        prompt |= {f"negative_{name}": torch.zeros_like(value) for name, value in prompt.items()}
    if "strength" in arguments:
        arguments["image"] = torch.rand(1, 3, side, side, generator=generator)
    return pipe(
        **prompt, height=side, width=side, guidance_scale=guidance_scale, generator=generator, output_type="latent", **arguments
    ).images


def flux_example(pipe, image: int = 16, text: int = TEXT) -> dict[str, torch.Tensor]:
    """Inputs of the pipeline's transformer."""
    dtype = pipe.transformer.dtype
    return {
        "hidden_states": torch.zeros(1, image, 4, dtype=dtype), "timestep": torch.zeros(1, dtype=dtype),
        "encoder_hidden_states": torch.zeros(1, text, 12, dtype=dtype),
        "pooled_projections": torch.zeros(1, 10, dtype=dtype), "img_ids": torch.zeros(image, 3, dtype=dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype), "guidance": torch.zeros(1),
    }  # fmt: skip


def sd3_example(rows: int = 1) -> dict[str, torch.Tensor]:
    """Likewise."""
    return {
        "hidden_states": torch.zeros(rows, 4, 8, 8), "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, TEXT, 12), "pooled_projections": torch.zeros(rows, 10),
    }  # fmt: skip
