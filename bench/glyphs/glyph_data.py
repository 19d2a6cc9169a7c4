"""Procedural glyph images: the training data of glyph-dit and of its classifier.

Ten characters in the three DejaVu Bold faces that ship with matplotlib, drawn at four times the size, warped by a small
random affine map, box-downsampled and coloured: a bright hue on a dark one. Everything follows from the seed.
"""

import colorsys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from stepgraph.assets.glyphs import CLASSES

FACES = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
OVERSAMPLE = 4


@dataclass(frozen=True)
class Warp:
    """Range of the random affine map: degrees, shear factor, scale factors, shift in output pixels."""

    rotation: float = 15.0
    shear: float = 0.15
    scale: tuple[float, float] = (0.85, 1.12)
    shift: float = 1.5


@cache
def glyph_mask(character: str, face: str, size: int) -> Image.Image:
    """The character centred on a black [4*size, 4*size] canvas, as an 8-bit mask."""
    side = size * OVERSAMPLE
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / face
    font = ImageFont.truetype(str(path), int(side * 0.8))
    canvas = Image.new("L", (side, side), 0)
    ImageDraw.Draw(canvas).text((side / 2, side / 2), character, fill=255, font=font, anchor="mm")
    return canvas


def warped(mask: Image.Image, warp: Warp, rng: np.random.Generator) -> np.ndarray:
    """One random affine view of the mask, box-downsampled to [size, size], values in 0..1."""
    side = mask.width
    angle = np.deg2rad(rng.uniform(-warp.rotation, warp.rotation))
    shear = rng.uniform(-warp.shear, warp.shear)
    scale = rng.uniform(*warp.scale)
    shift = rng.uniform(-warp.shift, warp.shift, 2) * OVERSAMPLE
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(scale * rotation @ np.array([[1.0, shear], [0.0, 1.0]]))
    centre = np.full(2, side / 2)
    offset = centre - inverse @ (centre + shift)
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    view = mask.transform(mask.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    size = side // OVERSAMPLE
    cover: np.ndarray = np.asarray(view, np.float32).reshape(size, OVERSAMPLE, size, OVERSAMPLE).mean((1, 3)) / 255
    return cover


def render(count: int, size: int, seed: int, warp: Warp | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 3, size, size] uint8 and labels [count] int64, the classes in equal shares and random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    images = np.empty((count, 3, size, size), np.uint8)
    for image, label in zip(images, labels, strict=True):
        mask = glyph_mask(CLASSES[label], FACES[rng.integers(len(FACES))], size)
        ink = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.55, 1.0), rng.uniform(0.85, 1.0)))
        paper = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.4, 1.0), rng.uniform(0.08, 0.32)))
        cover = warped(mask, warp or Warp(), rng)
        image[:] = np.rint(255 * (paper[:, None, None] + (ink - paper)[:, None, None] * cover)).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
