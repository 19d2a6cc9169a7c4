"""The shipped model with fewer blocks: real weights and images of the same size, at a fraction of the cost."""

from pathlib import Path

import diffusers

from stepgraph.compiler.entry.load_model import load_model, load_scheduler


def small_glyph_dit(layers: int = 1) -> diffusers.DiTTransformer2DModel:
    """glyph-dit's first blocks."""
    model = load_model("glyph-dit")
    model.transformer_blocks = model.transformer_blocks[:layers]
    model.register_to_config(num_layers=layers)
    return model.eval()


def save_small_glyph_dit(folder: Path, layers: int = 1) -> Path:
    """The same with its scheduler as a folder that the command line takes for a model."""
    small_glyph_dit(layers).save_pretrained(folder)
    load_scheduler("glyph-dit").save_pretrained(folder)
    return folder
