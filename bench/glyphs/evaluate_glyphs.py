"""Score glyph-dit: classifier accuracy over many samples, and a contact sheet.

Usage: python -m stepgraph.bench.glyphs.evaluate_glyphs --samples 1000 --out out/evaluation
"""

import argparse
import json
from pathlib import Path

import torch
from rich.progress import Progress

from stepgraph.assets.glyphs import CLASSES, NULL_CLASS, contact_sheet, load_classifier
from stepgraph.assets.image_classifier import top_accuracy
from stepgraph.bench.glyphs.glyph_data import render
from stepgraph.bench.record import write_record
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.files.whole_file import whole_file
from stepgraph.runtime.sampling.sample import sample


def main() -> None:
    """Sample, score, and write `glyph-dit-evaluation.json` and `glyph-dit-samples.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/evaluation"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, scheduler, classifier = (
        load_model("glyph-dit", arguments.device),
        load_scheduler("glyph-dit"),
        load_classifier(),
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    labels = torch.arange(arguments.samples) % len(CLASSES)
    images = []
    with Progress() as progress:
        for part in progress.track(labels.split(arguments.batch), description="sampling"):
            noise = torch.randn(len(part), 3, 24, 24, generator=generator).to(arguments.device)
            wanted = part.to(arguments.device)
            conditioning = {"class_labels": wanted, "negative_class_labels": torch.full_like(wanted, NULL_CLASS)}
            images.append(sample(model, scheduler, noise, arguments.guidance, steps=arguments.steps, **conditioning).cpu())
    generated = torch.cat(images)
    real, real_labels = render(10_000, 24, seed=3)
    results = {
        "model": "glyph-dit",
        "samples": arguments.samples,
        "scheduler": type(scheduler).__name__,
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "seed": arguments.seed,
        "accuracy": top_accuracy(classifier, generated, labels),
        "per_class": {
            name: top_accuracy(classifier, generated[labels == i], labels[labels == i]) for i, name in enumerate(CLASSES)
        },
        "accuracy_on_10000_fresh_real_images": top_accuracy(classifier, real.float() / 127.5 - 1, real_labels),
    }
    write_record(arguments.out / "glyph-dit-evaluation.json", arguments.device, results)
    with whole_file(arguments.out / "glyph-dit-samples.png") as partial:
        contact_sheet(generated[:100], columns=10).save(partial)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
