"""A diffusers pipeline around the tiny DiT, and what the oracle makes of its calls."""

import copy

import diffusers
import pytest
import torch

from helpers.oracle import Oracle
from helpers.pixart_sd3 import SD3
from helpers.tiny import tiny_dit, tiny_scheduler

STEPS = 4


@pytest.fixture
def pipe():
    return tiny_pipe(tiny_dit())


def tiny_pipe(transformer) -> diffusers.DiTPipeline:
    """The pipeline, where its transformer is."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    ).eval()  # fmt: skip
    made = diffusers.DiTPipeline(transformer, vae.to(transformer.device), tiny_scheduler("ddim"))
    made.set_progress_bar_config(disable=True)
    return made


def images(pipe, batch: int = 1, guidance_scale: float = 4.0, steps: int = STEPS, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        list(range(batch)), guidance_scale=guidance_scale, num_inference_steps=steps, generator=generator, output_type="pt"
    ).images


def oracle_images(pipe, plan, **arguments) -> torch.Tensor:
    with Oracle.of(pipe.transformer, plan).in_place_of_model() as oracle:
        result = images(pipe, **arguments)
    assert oracle.calls == plan.steps
    return result


def shared(pipe, scheduler=None) -> diffusers.DiTPipeline:
    """A pipeline with the transformer of another one, and a scheduler of its own."""
    twin = diffusers.DiTPipeline(pipe.transformer, pipe.vae, scheduler or copy.deepcopy(pipe.scheduler))
    twin.set_progress_bar_config(disable=True)
    return twin


def sd3_pipe() -> diffusers.StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline of three blocks without text encoders: prompts are given as embeddings."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8, shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    ).eval()  # fmt: skip
    made = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**SD3).eval(), vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def sd3_images(pipe, batch: int = 1, seed: int = 0, **arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    text, pooled = torch.randn(2, batch, 5, 12, generator=generator), torch.randn(2, batch, 10, generator=generator)
    return pipe(
        prompt_embeds=text[0], negative_prompt_embeds=text[1], pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=pooled[1], height=8, width=8, num_inference_steps=STEPS, generator=generator,
        output_type="latent", **arguments,
    ).images  # fmt: skip
