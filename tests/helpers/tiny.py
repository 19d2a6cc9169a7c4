"""The tiny DiT, its inputs, and schedulers by short names."""

import diffusers
import torch

NULL_CLASS = 1000


TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": NULL_CLASS,
}  # fmt: skip


def tiny_dit(seed: int = 0, **changes) -> diffusers.DiTTransformer2DModel:
    """A DiT of two blocks, width 32 and 16 tokens, with random weights."""
    torch.manual_seed(seed)
    return diffusers.DiTTransformer2DModel(**(TINY | changes)).eval()


def tiny_scheduler(name: str):
    """A scheduler by the short name that the tests use."""
    return {
        "ddim": diffusers.DDIMScheduler,
        "dpm++": diffusers.DPMSolverMultistepScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
    }[name]()


def labels(*classes: int) -> dict[str, torch.Tensor]:
    """The conditioning of a DiT."""
    return {"class_labels": torch.tensor(classes)}


def noise(batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Standard normal latents for the tiny DiT."""
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 1, seed: int = 0, timestep: int = 500) -> dict[str, torch.Tensor]:
    """Arguments of one evaluation of the tiny DiT."""
    return {
        "hidden_states": noise(batch, seed),
        "timestep": torch.full((batch,), timestep),
        "class_labels": torch.arange(batch) + 3,
    }
