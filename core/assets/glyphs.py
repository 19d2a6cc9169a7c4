"""glyph-dit, the small trained diffusion transformer that ships with stepgraph, and the classifier that scores it.

Both were trained by `python -m stepgraph.bench.glyphs.train_glyphs`; the weights lie in `stepgraph/assets`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn

if TYPE_CHECKING:
    from PIL.Image import Image

ASSETS = Path(__file__).parent
CLASSES = "ABEHKRS258"
NULL_CLASS = len(CLASSES)


class GlyphClassifier(nn.Module):
    """A small convolutional network over glyph images; its 32 features are the backbone of the quality metrics."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2 if i else 1, 1), nn.GroupNorm(4, b), nn.GELU())
                for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
            ),
            nn.Sequential(nn.Conv2d(64, 64, 3, 2, 1), nn.GroupNorm(4, 64), nn.GELU()),
        )
        self.embed = nn.Linear(64, 32)
        self.head = nn.Linear(32, len(CLASSES))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in -1..1 to features [B, 32]."""
        return torch.tanh(self.embed(self.stages(images).mean((2, 3))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in -1..1 to class logits [B, 10]."""
        logits: torch.Tensor = self.head(self.features(images))
        return logits


def load_classifier(path: Path = ASSETS / "glyph-classifier.safetensors") -> GlyphClassifier:
    """The trained classifier, fp32, in evaluation mode, on the CPU."""
    classifier = GlyphClassifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: GlyphClassifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the images [B, 3, H, W] in -1..1 that the classifier sees as their labels [B]."""
    guesses = [classifier(part.float().cpu().clamp(-1, 1)).argmax(1) for part in images.split(500)]
    return float((torch.cat(guesses) == labels.cpu()).double().mean())


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
