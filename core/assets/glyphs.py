"""glyph-dit, the small trained diffusion transformer that ships with stepgraph, and the classifier that scores it.

Both were trained by `python -m stepgraph.bench.glyphs.train_glyphs`; the weights lie in `stepgraph/assets`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from stepgraph.assets.image_classifier import ImageClassifier

if TYPE_CHECKING:
    from PIL.Image import Image

ASSETS = Path(__file__).parent
CLASSES = "ABEHKRS258"
NULL_CLASS = len(CLASSES)


def glyph_classifier() -> ImageClassifier:
    """The untrained classifier; its 32 features are the backbone of the quality metrics."""
    return ImageClassifier(len(CLASSES))


def load_classifier(path: Path = ASSETS / "glyph-classifier.safetensors") -> ImageClassifier:
    """The trained classifier, fp32, in evaluation mode, on the CPU."""
    classifier = glyph_classifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval()


def contact_sheet(images: torch.Tensor, columns: int = 8, zoom: int = 3) -> "Image":
    """Images [B, 3, H, W] in -1..1 as one picture, row by row."""
    from PIL import Image

    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = torch.zeros(rows * columns, channels, height, width)
    sheet[:count] = (images.detach().float().cpu() / 2 + 0.5).clamp(0, 1)
    grid = sheet.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = (grid.reshape(rows * height, columns * width, channels) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels).resize((columns * width * zoom, rows * height * zoom), Image.Resampling.NEAREST)
