"""A handful of icons in the JSON of Iconify's packages, and a recipe that trains on them in a second."""

import torch

from stepgraph.bench.emoji.emoji_data import Jitter
from stepgraph.bench.emoji.icons import Icons
from stepgraph.bench.emoji.train_flux_emoji import Recipe

SHAPE = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 4, 8),
}
RECIPE = Recipe(8, None, SHAPE, width=12, batch=4, still=1, jitter=Jitter(shift=1.0, scale=(0.8, 1.0), mirrored=0.5))
BODIES = {
    "pizza": '<rect width="32" height="16" fill="#f00"/>',
    "left-arrow": '<rect width="8" height="32" fill="#00f"/>',
    "police-car": '<rect x="16" width="16" height="32" fill="#0f0"/>',
    "police-car-light": '<circle cx="16" cy="16" r="8" fill="#f00"/>',
    "waving-hand": '<circle cx="16" cy="16" r="12" fill="#fc0"/>',
}
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
COLLECTION = {
    "prefix": "fluent-emoji-flat", "width": 32, "height": 32,
    "icons": {name: {"body": body} for name, body in BODIES.items()}
    | {f"waving-hand-{tone}": {"body": BODIES["waving-hand"]} for tone in TONES},
}  # fmt: skip


def drawn_icons(size: int = 8) -> Icons:
    """Random icons of these names, without a renderer."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (len(BODIES), 4, 2 * size, 2 * size), generator=generator, dtype=torch.uint8)
    return Icons(tuple(BODIES), pixels)
