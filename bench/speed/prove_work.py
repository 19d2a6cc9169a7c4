"""What `bench/gpu_suite.sh prove` runs whole: DiT-XL/2-256 and FLUX.1-dev's shape with random weights, or tiny models."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from stepgraph.bench.speed.books import BOOK, plan_named
from stepgraph.bench.speed.peer_cache_dit import REPEATED
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.models import family_of
from stepgraph.compiler.models.flux import positions
from stepgraph.compiler.planning.import_plan import import_plan
from stepgraph.config import CompileConfig
from stepgraph.plan import CachePlan

FLUX_BOOK = "invardiff_flux_28_fast.json"
TINY_DIT = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 1,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
TINY_FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}  # fmt: skip


@dataclass
class Work:
    """What all rows of a part run.

    Attributes:
        model: The eager model.
        scheduler: A diffusers scheduler, not yet set to its steps.
        steps: Of a run.
        noise: Latents of one call.
        scale: Of the guidance; 1 for none.
        conditioning: For `sample`.
        repeated: Classes of the blocks that `compile_repeated_blocks` compiles.
        config: How ours are compiled.
        plans: Folder of published plans; None for none.
        tiny: Whether the model is a tiny one, and nothing is compiled by torch or inductor.
    """

    model: Any
    scheduler: Any
    steps: int
    noise: torch.Tensor
    scale: float
    conditioning: Mapping[str, torch.Tensor]
    repeated: list[str]
    config: CompileConfig
    plans: Path | None
    tiny: bool

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The forward's arguments at the first step: the latents are the noise, doubled with guidance."""
        doubled = 2 if self.scale > 1 else 1
        positive = {name: value for name, value in self.conditioning.items() if not name.startswith("negative_")}
        family = family_of(self.model)
        # Sizes of text and image are the conditioning's; a class has none.
        inputs = example_inputs(self.model, doubled * len(self.noise), positive if family.completed is not None else None)
        latents, *_ = inputs
        inputs[latents] = torch.cat([self.noise] * doubled)
        return inputs

    def plan(self, name: str) -> tuple[CachePlan, str]:
        """A plan by name, and what it is in words.

        "full" computes everything; "slow book" and "fast book" are InvarDiff's for DiT-XL/2 and FLUX.1-dev, where the folder
        of plans has them and the model their size; else an interval of 3.
        """
        common: dict[str, Any] = {"model": self.model, "scheduler": self.scheduler, "steps": self.steps}
        common |= {"example_inputs": self.inputs, "guidance": "batched" if self.scale > 1 else "none"}
        if name == "full":
            return make_plan("full", **common), name
        book = BOOK if name == "slow book" else FLUX_BOOK
        if self.plans is None or not (self.plans / book).is_file() or (name == "fast book" and self.tiny):
            return make_plan("interval", every=3, **common), f"interval of 3: no {book} for this model"
        if name == "slow book":
            return plan_named("slow", self.model, self.scheduler, self.steps, self.plans), book
        return import_plan(self.plans / book, self.model, self.scheduler, steps=self.steps), book


def dit(images: int, options: argparse.Namespace) -> Work:
    """DiT-XL/2-256, DDIM 50, guidance 4."""
    name, device = "dit-xl-2-256:random", options.device
    dtype = torch.float32 if options.tiny else torch.bfloat16
    model: Any = _tiny(DiTTransformer2DModel, TINY_DIT) if options.tiny else load_model(name, device, dtype)
    side = model.config.sample_size
    noise = torch.randn(images, 4, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    labels = torch.arange(images, device=device)
    conditioning = {"class_labels": labels, "negative_class_labels": torch.full_like(labels, 1000)}
    scheduler = DDIMScheduler() if options.tiny else load_scheduler(name)
    steps = 3 if options.tiny else 50
    return Work(model, scheduler, steps, noise, 4.0, conditioning, REPEATED, _config(options), options.plans, options.tiny)


def flux(options: argparse.Namespace) -> Work:
    """FLUX.1-dev's shape at 1024 x 1024 pixels, 28 steps, one image."""
    device, dtype = options.device, torch.float32 if options.tiny else torch.bfloat16
    model: Any = _tiny(FluxTransformer2DModel, TINY_FLUX) if options.tiny else load_model("flux-dev:random", device, dtype)
    side, text = (4, 5) if options.tiny else (64, 512)
    generator, size = torch.Generator().manual_seed(0), model.config

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    conditioning = {
        "encoder_hidden_states": drawn(1, text, size.joint_attention_dim),
        "pooled_projections": drawn(1, size.pooled_projection_dim),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": positions(side, dtype, torch.device(device)),
        "txt_ids": torch.zeros(text, 3, dtype=dtype, device=device),
    }
    noise = drawn(1, side * side, size.in_channels)
    scheduler = FlowMatchEulerDiscreteScheduler() if options.tiny else load_scheduler("flux-dev:random")
    return Work(
        model, scheduler, 3 if options.tiny else 28, noise, 1.0, conditioning, list(model._repeated_blocks),
        _config(options), options.plans, options.tiny,
    )  # fmt: skip


def _tiny(kind: Any, config: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)
    return kind(**config).eval()


def _config(options: argparse.Namespace) -> CompileConfig:
    return CompileConfig("eager" if options.tiny else "inductor")
