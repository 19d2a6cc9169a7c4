"""Batches of icons on backgrounds, shifted, scaled and mirrored, with their captions; all of it follows from a random state."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import affine_grid, grid_sample

from stepgraph.assets.emoji_captions import BACKGROUNDS, caption
from stepgraph.assets.flux_emoji import WordEncoder
from stepgraph.bench.emoji.captions import UNSEEN, may_mirror
from stepgraph.bench.emoji.icons import Icons


@dataclass(frozen=True)
class Jitter:
    """How an icon is placed.

    Attributes:
        shift: Largest shift either way, in pixels of the picture.
        scale: Smallest and largest size.
        mirrored: Probability, of those icons whose name allows it.
    """

    shift: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    mirrored: float = 0.0


STILL = Jitter()
# What the retrieval network is tested on, with backgrounds that nothing was trained on.
FARTHER = Jitter(shift=2.0, scale=(0.85, 1.05), mirrored=0.5)


@dataclass(frozen=True)
class Batch:
    """Pictures [B, 3, S, S] in -1..1, numbers of icons [B] and of backgrounds [B], int64."""

    pictures: torch.Tensor
    icons: torch.Tensor
    backgrounds: torch.Tensor


class EmojiData:
    """Icons and backgrounds on a device.

    Attributes:
        icons: The icons; pictures are half as large as their pixels.
        backgrounds: RGB [K, 3] in 0..1.
    """

    def __init__(self, icons: Icons, device: str | torch.device = "cpu", backgrounds: Sequence[Sequence[float]] = ()) -> None:
        self.icons, self.device = icons, torch.device(device)
        self.pixels = icons.pixels.to(self.device)
        self.backgrounds = torch.tensor(list(backgrounds) or list(BACKGROUNDS.values()), device=self.device)
        self.mirrors = torch.tensor([may_mirror(name) for name in icons.names])

    def batch(self, count: int, jitter: Jitter, generator: torch.Generator | None = None) -> Batch:
        """`count` pictures drawn from a CPU generator, or from torch's own."""
        icons = torch.randint(len(self.mirrors), (count,), generator=generator)
        backgrounds = torch.randint(len(self.backgrounds), (count,), generator=generator)
        shift = (2 * torch.rand(count, 2, generator=generator) - 1) * jitter.shift
        low, high = jitter.scale
        scale = low + (high - low) * torch.rand(count, generator=generator)
        mirrored = (torch.rand(count, generator=generator) < jitter.mirrored) & self.mirrors[icons]
        icons, backgrounds = icons.to(self.device), backgrounds.to(self.device)
        placing = (value.to(self.device) for value in (shift, scale, mirrored))
        return Batch(place(self.pixels[icons], self.backgrounds[backgrounds], *placing), icons, backgrounds)

    def caption_tokens(self, encoder: WordEncoder) -> torch.Tensor:
        """Tokens of every icon's caption on every background, [N, K, L]."""
        rows = [encoder.tokens([caption(name, background) for background in BACKGROUNDS]) for name in self.icons.names]
        return torch.stack(rows).to(self.device)

    def still(self) -> torch.Tensor:
        """Every icon as it is on every background, icons in turn, [K * N, 3, S, S] in -1..1."""
        count = len(self.pixels)
        zeros = torch.zeros(count, device=self.device)
        return torch.cat(
            [
                place(self.pixels, colour.expand(count, 3), torch.stack([zeros, zeros], 1), zeros + 1, zeros > 0)
                for colour in self.backgrounds
            ]
        )


def unseen(icons: Icons, count: int, seed: int) -> Batch:
    """Pictures whose backgrounds nothing is trained on, shifted and scaled more than those of any training."""
    return EmojiData(icons, "cpu", UNSEEN).batch(count, FARTHER, torch.Generator().manual_seed(seed))


def place(
    pixels: torch.Tensor, colours: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, mirrored: torch.Tensor
) -> torch.Tensor:
    """Pictures [B, 3, S, S] in -1..1 of icons on plain backgrounds.

    Args:
        pixels: RGBA of the icons, [B, 4, 2 S, 2 S] uint8.
        colours: RGB of the backgrounds in 0..1, [B, 3].
        shift: To the right and down, in pixels of the picture, [B, 2].
        scale: Of the icons about the middle, [B].
        mirrored: Left to right, about the icon's own middle, [B] bool.
    """
    side = pixels.shape[-1] // 2
    values = pixels.float() / 255
    cover = values[:, 3:]
    premultiplied = torch.cat([values[:, :3] * cover, cover], dim=1)
    # From places in the picture to places in the icon, both in -1..1.
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    across = torch.where(mirrored, -1.0, 1.0) / scale
    offset = -2 * shift / side
    theta[:, 0, 0], theta[:, 1, 1] = across, 1 / scale
    theta[:, 0, 2], theta[:, 1, 2] = offset[:, 0] * across, offset[:, 1] / scale
    grid = affine_grid(theta, [len(pixels), 4, side, side], align_corners=False)
    placed = grid_sample(premultiplied, grid, align_corners=False)
    pictures: torch.Tensor = 2 * (placed[:, :3] + colours[:, :, None, None] * (1 - placed[:, 3:])) - 1
    return pictures
