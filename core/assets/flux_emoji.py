"""What flux-emoji has beside its transformer: pixels as latents, words as text embeddings, and a real FluxPipeline of it all.

Its folder holds `transformer`, `vae`, `text` and `scheduler`, each as its own `save_pretrained` wrote it; beside it lies the
retrieval network, which says which icon a picture shows. They were trained by `python -m
stepgraph.bench.emoji.train_flux_emoji` and `python -m stepgraph.bench.emoji.train_retrieval`. The module imports
diffusers when it is imported, because classes of models have to inherit from it; whoever needs it imports it in a function.
"""

import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, FluxPipeline, FluxTransformer2DModel, ModelMixin  # noqa: TID253
from diffusers.configuration_utils import register_to_config  # noqa: TID253
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput  # noqa: TID253
from diffusers.models.autoencoders.vae import DecoderOutput  # noqa: TID253
from safetensors import safe_open
from torch import nn

from stepgraph.assets.glyphs import ASSETS
from stepgraph.assets.image_classifier import ImageClassifier
from stepgraph.errors import ArgumentError

FOLDER = ASSETS / "flux-emoji"
PARTS = ("transformer", "vae", "text", "scheduler")
# Either way, of a token.
PIXELS = 4
WIDTHS, FEATURES = (32, 64, 128, 128), 128


class PixelVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The identity: latents [B, 12, H / 2, W / 2] are the pixels [B, 3, H, W] in -1..1, four to a place.

    With FLUX's own packing of 2 x 2 latents a token has 4 x 4 pixels. The configuration has what pipelines read of it: two
    entries of `block_out_channels` stand for one halving of the resolution.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        block_out_channels: Sequence[int] = (12, 12),
        latent_channels: int = 12,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        # A model without any tensor has neither a dtype nor a device.
        self.register_buffer("anchor", torch.zeros(1))

    def encode(self, pixels: torch.Tensor, return_dict: bool = True) -> Any:
        """Pixels [B, 3, H, W] to latents [B, 12, H / 2, W / 2]."""
        latents = nn.functional.pixel_unshuffle(pixels, 2)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(self, latents: torch.Tensor, return_dict: bool = True, **_: Any) -> Any:
        """Latents [B, 12, H / 2, W / 2] to pixels [B, 3, H, W]."""
        pixels = nn.functional.pixel_shuffle(latents, 2)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)


class WordEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A text encoder that knows some words: an embedding with positions, and its mean through a linear map as pooled text."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, *, words: Sequence[str], length: int, width: int) -> None:
        super().__init__()
        # Token 0 is no word.
        self.embedding = nn.Embedding(len(words) + 1, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.pooled = nn.Linear(width, width)
        self.numbers = {word: number for number, word in enumerate(words, start=1)}

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """Numbers of the words, [B, length] int64; an empty prompt is what the model was trained without text by.

        Raises:
            ArgumentError: A word is not known, or there are too many.
        """
        numbers = torch.zeros(len(prompts), self.positions.shape[0], dtype=torch.int64)
        for row, prompt in zip(numbers, prompts, strict=True):
            words = re.findall(r"[^\s-]+", prompt.lower())
            if len(words) > len(row):
                raise ArgumentError(f"{prompt!r} has {len(words)} words; flux-emoji takes at most {len(row)}")
            row[: len(words)] = torch.tensor([self._number(word, prompt) for word in words], dtype=torch.int64)
        return numbers.to(self.positions.device)

    def _number(self, word: str, prompt: str) -> int:
        if word not in self.numbers:
            near = difflib.get_close_matches(word, self.numbers, n=4, cutoff=0.4)
            instead = f"the nearest known ones are {', '.join(near)}" if near else "none that it knows is near"
            raise ArgumentError(f"flux-emoji does not know the word {word!r} of {prompt!r}; {instead}")
        return self.numbers[word]

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, L] to embeddings [B, L, D] and pooled text [B, D]."""
        embeddings = self.embedding(tokens) + self.positions
        known = (tokens > 0).to(embeddings.dtype)[..., None]
        return embeddings, self.pooled((embeddings * known).sum(1) / known.sum(1).clamp_min(1))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What a FluxPipeline makes of prompts: `prompt_embeds` [B, L, D], `pooled_prompt_embeds` [B, D], `text_ids` [L, 3].

        Raises:
            ArgumentError: As `tokens`.
        """
        embeddings, pooled = self(self.tokens(prompts))
        text_ids = torch.zeros(embeddings.shape[1], 3, dtype=embeddings.dtype, device=embeddings.device)
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled, "text_ids": text_ids}

    def conditioning(self, prompts: Sequence[str], size: int, guided: bool = True) -> dict[str, torch.Tensor]:
        """What `stepgraph.sample` conditions the transformer on, for pictures of `size` pixels; with the unconditional half.

        Raises:
            ArgumentError: As `tokens`.
        """
        conditioning: dict[str, torch.Tensor] = {}
        for prefix, texts in {"": prompts, **({"negative_": [""] * len(prompts)} if guided else {})}.items():
            encoded = self.encode(texts)
            conditioning[f"{prefix}encoder_hidden_states"] = encoded["prompt_embeds"]
            conditioning[f"{prefix}pooled_projections"] = encoded["pooled_prompt_embeds"]
        ids = encoded["text_ids"]
        return conditioning | {"img_ids": positions(size, ids.device, ids.dtype), "txt_ids": ids}

    def arguments(self, prompts: Sequence[str], guidance: float = 1.0) -> dict[str, Any]:
        """The arguments of a call of a FluxPipeline; true guidance, of two calls a step, where it is above 1."""
        arguments: dict[str, Any] = self.encode(prompts)
        del arguments["text_ids"]  # the pipeline makes them itself
        if guidance > 1:
            empty = self.encode([""] * len(prompts))
            arguments |= {f"negative_{name}": empty[name] for name in arguments} | {"true_cfg_scale": guidance}
        return arguments


def assemble(transformer: nn.Module, scheduler: Any, vae: PixelVAE | None = None) -> FluxPipeline:
    """The pipeline; its text encoder stands beside it, and gives the arguments of its calls."""
    pipe = FluxPipeline(scheduler, vae or PixelVAE(), None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def positions(size: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Positions of the tokens of square pictures, [(size / 4)^2, 3]: 0, row, column."""
    axis = torch.arange(size // PIXELS, dtype=dtype, device=device)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


def unpacked(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N, 48] of square pictures, as FluxPipeline packs their latents, as pixels [B, 3, 4 N^.5, 4 N^.5]."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    return nn.functional.pixel_shuffle(nn.functional.pixel_shuffle(grid, 2), 2)


def retrieval_network(classes: int) -> ImageClassifier:
    """The untrained retrieval network."""
    return ImageClassifier(classes, WIDTHS, FEATURES)


def load_retrieval(path: Path = ASSETS / "emoji-retrieval.safetensors") -> tuple[ImageClassifier, list[str]]:
    """The trained retrieval network, fp32 on the CPU, and the icons' names in the order of its classes."""
    with safe_open(path, framework="pt") as file:
        names = json.loads(file.metadata()["names"])
        network = retrieval_network(len(names))
        network.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118
    return network.eval(), names


def load_words(folder: Path = FOLDER, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> WordEncoder:
    """The text encoder of a trained model's folder."""
    words: WordEncoder = WordEncoder.from_pretrained(folder / "text", torch_dtype=dtype).to(device).eval()
    return words


def load_flux_emoji(
    folder: Path = FOLDER, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[FluxPipeline, WordEncoder]:
    """The pipeline and the text encoder of a trained model's folder.

    Raises:
        ArgumentError: The folder lacks a part; the message says how to train the model.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    lacking = [part for part in PARTS if not (folder / part).is_dir()]
    if lacking:
        raise ArgumentError(
            f"{folder} lacks {', '.join(lacking)} of flux-emoji; `python -m stepgraph.bench.emoji.train_flux_emoji` trains it"
        )
    transformer, vae = (
        kind.from_pretrained(folder / part, torch_dtype=dtype).to(device).eval()
        for part, kind in (("transformer", FluxTransformer2DModel), ("vae", PixelVAE))
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return assemble(transformer, scheduler, vae), load_words(folder, device, dtype)
