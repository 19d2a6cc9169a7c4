"""Choose the most distinct icons, and divide all captions into a calibration and a measuring half.

    python -m stepgraph.bench.emoji.choose_icons --icons out/emoji/icons-32.npz

Writes `distinct.txt` and `split.txt` beside this file; both follow from the icons alone.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from stepgraph.assets.emoji_captions import BACKGROUNDS
from stepgraph.bench.emoji.captions import FOLDER, write_split
from stepgraph.bench.emoji.icons import Icons, rendered


def picture_distances(icons: Icons, side: int = 16) -> torch.Tensor:
    """RMS distances [N, N] of the icons on white, with their outlines, at `side` pixels; 1 on average."""
    pixels = torch.nn.functional.interpolate(icons.pixels.float() / 255, size=(side, side), mode="area")
    colours, cover = pixels[:, :3], pixels[:, 3:]
    flat = torch.cat([colours * cover + 1 - cover, cover], dim=1).flatten(1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / distances.mean()


def name_distances(names: Sequence[str]) -> torch.Tensor:
    """1 less the share of words that two names have in common, [N, N]."""
    words = sorted({word for name in names for word in name.split("-")})
    has = torch.tensor([[word in name.split("-") for word in words] for name in names], dtype=torch.float64)
    both = has @ has.T
    counts = has.sum(1)
    distances: torch.Tensor = 1 - both / (counts[:, None] + counts[None] - both)
    return distances


def most_distinct(icons: Icons, count: int, first: str = "pizza") -> list[str]:
    """Names, from `first` on each the farthest from all before it, by picture and, at most 4.3 times as much, by name."""
    distances = picture_distances(icons).double() * (0.3 + name_distances(icons.names))
    order = [icons.names.index(first)]
    nearest = distances[order[0]].clone()
    while len(order) < min(count, len(icons.names)):
        order.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distances[order[-1]])
    return [icons.names[place] for place in order]


def divided(names: Sequence[str], seed: int = 0) -> dict[str, list[str]]:
    """Of each icon, half of the backgrounds, drawn at random: its captions with these are for calibration."""
    draw = random.Random(seed)
    backgrounds = list(BACKGROUNDS)
    return {name: sorted(draw.sample(backgrounds, len(backgrounds) // 2), key=backgrounds.index) for name in sorted(names)}


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, default=Path("out/emoji/icons-32.npz"), help="fetched and rendered if not there")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    icons = rendered(arguments.icons, 32)
    names = most_distinct(icons, arguments.count)
    (arguments.out / "distinct.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    write_split(divided(icons.names), arguments.out / "split.txt")
    print(f"{len(names)} of {len(icons.names)} icons")


if __name__ == "__main__":
    main()
