"""Train flux-emoji, a small text-conditioned FLUX, by flow matching.

    python -m stepgraph.bench.emoji.train_flux_emoji --compile             # about an hour and a half on two CPU cores
    python -m stepgraph.bench.emoji.train_flux_emoji --icons 256           # fewer icons
    python -m stepgraph.bench.emoji.train_flux_emoji flux-emoji-l --device cuda --bf16 --limit 280

The icons are fetched and rendered where `--data` does not hold them yet (`stepgraph.bench.emoji.icons`). A run that was killed,
or stopped by SIGTERM or by --limit, goes on from its last checkpoint when the same command is given again, to the same bits. A
complete one writes the folder of the model (`transformer`, `vae`, `text`, `scheduler`; fp16, averaged), the artwork's licence,
and the loss curve into --out.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepgraph.assets.flux_emoji import PIXELS, PixelVAE, WordEncoder, positions
from stepgraph.bench.emoji.captions import distinct_names, longest, vocabulary
from stepgraph.bench.emoji.emoji_data import STILL, EmojiData, Jitter
from stepgraph.bench.emoji.icons import NOTICE, Icons, rendered
from stepgraph.bench.record import write_record
from stepgraph.bench.training import Training, plot_losses

# Values of a token: RGB pixels.
CHANNELS = 3 * PIXELS**2

PLACED = Jitter(shift=1.0, scale=(0.92, 1.0), mirrored=0.5)


@dataclass(frozen=True)
class Recipe:
    """One model and how it is trained.

    Attributes:
        size: Of the pictures, in pixels.
        icons: How many, the most distinct ones; None for all.
        shape: Of the transformer, as its configuration says it.
        width: Of the text embeddings.
        minutes: What the steps take in all.
        batch: Pictures a step.
        rate: Peak learning rate.
        jitter: Of the pictures, after the first `still` steps.
        still: Steps in which icons stay where they are.
        keep: Of the averages.
        dropped: Share of the pictures that are learnt without text.
        shift: Of the noise levels, towards noise: at first, and at the end.
    """

    size: int
    icons: int | None
    shape: Mapping[str, Any]
    width: int = 128
    minutes: float = 85.0
    batch: int = 32
    rate: float = 1e-3
    jitter: Jitter = PLACED
    still: int = 1500
    keep: float = 0.9995
    dropped: float = 0.1
    shift: tuple[float, float] = (1.6, 1.0)


SMALL = {
    "num_layers": 3,
    "num_single_layers": 8,
    "attention_head_dim": 40,
    "num_attention_heads": 4,
    "axes_dims_rope": (8, 16, 16),
}
LARGE = {**SMALL, "num_attention_heads": 6}
RECIPES = {
    "flux-emoji": Recipe(32, 512, SMALL),
    "flux-emoji-l": Recipe(64, None, LARGE, minutes=4.5, batch=256),
}


def build(recipe: Recipe, names: Sequence[str]) -> tuple[FluxTransformer2DModel, WordEncoder]:
    """The untrained transformer and text encoder."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        joint_attention_dim=recipe.width,
        pooled_projection_dim=recipe.width,
        guidance_embeds=False,
        **recipe.shape,
    )
    return transformer, WordEncoder(words=vocabulary(names), length=longest(names), width=recipe.width)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """What the model is sampled with."""
    return FlowMatchEulerDiscreteScheduler(shift=2.0)


def packed(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, S, S] as the tokens [B, (S / 4)^2, 48] that FluxPipeline packs of their latents."""
    twice = nn.functional.pixel_unshuffle(nn.functional.pixel_unshuffle(pictures, 2), 2)
    return twice.flatten(2).transpose(1, 2)


def noise_levels(normal: torch.Tensor, shift: float) -> torch.Tensor:
    """Logit-normal levels in 0..1, shifted as FLUX's schedules are: `shift` times the odds."""
    level = torch.sigmoid(normal)
    return shift * level / (1 + (shift - 1) * level)


def rate_factor(step: int, total: int | None, warm_up: int = 300, steady: float = 0.6, floor: float = 0.02) -> float:
    """Factor on the peak learning rate: linear warm-up, then constant, then a cosine down to `floor`."""
    warm = min(1.0, (step + 1) / warm_up)
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * cooled(step, total, steady))))


def cooled(step: int, total: int | None, steady: float = 0.6) -> float:
    """How much of the last part of the training is over, 0..1; nothing of it as long as its end is not known."""
    if total is None:
        return 0.0
    return min(1.0, max(0.0, (step / total - steady) / (1 - steady)))


class FlowLoss:
    """Draws batches, and what the model's velocity misses on them."""

    def __init__(
        self, recipe: Recipe, data: EmojiData, transformer: Callable[..., Any], encoder: WordEncoder, bf16: bool
    ) -> None:
        self.recipe, self.data, self.transformer, self.encoder, self.bf16 = recipe, data, transformer, encoder, bf16
        self.tokens = data.caption_tokens(encoder)
        self.image_ids = positions(recipe.size, data.device)
        self.text_ids = torch.zeros(self.tokens.shape[-1], 3, device=data.device)

    def __call__(self, step: int, total: int | None) -> torch.Tensor:
        """The mean squared error of one batch; noise - clean is learnt at (1 - s) clean + s noise."""
        recipe, device = self.recipe, self.data.device
        batch = self.data.batch(recipe.batch, STILL if step < recipe.still else recipe.jitter)
        dropped = torch.rand(recipe.batch) < recipe.dropped
        first, last = recipe.shift
        level = noise_levels(torch.randn(recipe.batch), first + (last - first) * cooled(step, total)).to(device)
        clean = packed(batch.pictures)
        noise = torch.randn_like(clean)
        tokens = self.tokens[batch.icons, batch.backgrounds].masked_fill(dropped.to(device)[:, None], 0)
        share = level[:, None, None]
        attention = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16), attention:
            embeddings, pooled = self.encoder(tokens)
            velocity = self.transformer(
                hidden_states=(1 - share) * clean + share * noise, encoder_hidden_states=embeddings, pooled_projections=pooled,
                timestep=level, img_ids=self.image_ids, txt_ids=self.text_ids, return_dict=False,
            )[0]  # fmt: skip
        error: torch.Tensor = (velocity.float() - (noise - clean)).square().mean()
        return error


def train(
    name: str, recipe: Recipe, icons: Icons, out: Path, device: torch.device, *,
    steps: int | None = None, limit_s: float = math.inf, bf16: bool = False, compiled: bool = False,
) -> bool:  # fmt: skip
    """Train for at most `limit_s` seconds; returns whether the recipe is complete, and if so writes the model.

    Args:
        name: Of the model.
        recipe: How it is trained.
        icons: On what.
        out: An existing folder.
        device: Where.
        steps: In all, in place of the recipe's minutes.
        limit_s: Of this call.
        bf16: Whether to compute in bfloat16, with weights in float32.
        compiled: Whether to compile the transformer with inductor.
    """
    torch.manual_seed(0)
    modules = [module.to(device) for module in build(recipe, icons.names)]
    transformer, encoder = modules
    settings = {**asdict(recipe), "steps": steps, "bf16": bf16, "names": list(icons.names)}
    training = Training(
        modules, out / f"{name}.checkpoint.pt", settings, rate=recipe.rate, keep=recipe.keep, device=device, total=steps,
        budget_s=60 * recipe.minutes,
    )  # fmt: skip
    runner: Callable[..., Any] = torch.compile(transformer) if compiled else transformer
    loss = FlowLoss(recipe, EmojiData(icons, device), runner, encoder, bf16)
    done = training.run(
        name,
        lambda: loss(training.step, training.total),
        lambda: rate_factor(training.step, training.total),
        limit_s,
    )
    if done:
        training.use_average()
        write_model(out / name, transformer, encoder)
        facts = {"recipe": asdict(recipe), "icons": len(icons.names), "bf16": bf16, "compiled": compiled}
        pace = {
            "steps": training.step,
            "seconds": training.seconds,
            "pictures_per_s": training.step * recipe.batch / training.seconds,
        }
        curve = [round(value, 5) for value in training.losses[::10]]
        write_record(out / f"{name}-training.json", str(device), {**facts, **pace, "losses": curve})
        plot_losses(name, training.losses, out / f"{name}-loss.png", "MSE of the velocity")
        training.checkpoint.unlink(missing_ok=True)
    return done


def write_model(folder: Path, transformer: nn.Module, encoder: WordEncoder) -> None:
    """The folder that `stepgraph.assets.flux_emoji.load_flux_emoji` reads, in fp16, with the artwork's licence."""
    parts: dict[str, Any] = {"transformer": transformer, "text": encoder, "vae": PixelVAE()}
    for part, model in parts.items():
        half = type(model).from_config(model.config)
        half.load_state_dict(model.state_dict())
        half.half().save_pretrained(folder / part, max_shard_size="15MB")
    scheduler().save_pretrained(folder / "scheduler")
    (folder / "NOTICE.txt").write_text(NOTICE, encoding="utf-8")


def main() -> None:
    """Command line; exit status 3 says that the time ran out, or SIGTERM came, and a checkpoint was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="flux-emoji", choices=tuple(RECIPES))
    parser.add_argument("--icons", type=int, default=None, help="how many of the most distinct ones, in place of the recipe's")
    parser.add_argument("--minutes", type=float, default=None, help="of training over all calls, in place of the recipe's")
    parser.add_argument("--steps", type=int, default=None, help="in all, in place of minutes")
    parser.add_argument("--data", type=Path, default=None, help="rendered icons; by default out/emoji/icons-SIZE.npz")
    parser.add_argument("--out", type=Path, default=Path("out/emoji"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, which is slower on CPUs")
    parser.add_argument("--compile", action="store_true", help="compile the transformer with inductor")
    parser.add_argument("--limit", type=float, default=math.inf, help="stop after this many seconds, leaving a checkpoint")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[arguments.what]
    changed = {"icons": arguments.icons, "minutes": arguments.minutes}
    recipe = Recipe(**{**vars(recipe), **{name: value for name, value in changed.items() if value is not None}})
    icons = rendered(arguments.data or Path(f"out/emoji/icons-{recipe.size}.npz"), recipe.size)
    if recipe.icons is not None:
        icons = icons.chosen(distinct_names(recipe.icons))
    done = train(
        arguments.what, recipe, icons, arguments.out, torch.device(arguments.device), steps=arguments.steps,
        limit_s=arguments.limit, bf16=arguments.bf16, compiled=arguments.compile,
    )  # fmt: skip
    if not done:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
