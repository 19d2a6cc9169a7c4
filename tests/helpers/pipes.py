"""A diffusers pipeline around the tiny DiT, and what the oracle makes of its calls."""

import copy

import diffusers
import pytest
import torch

from helpers.oracle import Oracle
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
