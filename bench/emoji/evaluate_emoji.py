"""Score flux-emoji: does the retrieval network find the captions' icons, how near are the pictures to real ones; and sheets.

    python -m stepgraph.bench.emoji.evaluate_emoji --model out/emoji/flux-emoji --samples 1000
    python -m stepgraph.bench.emoji.evaluate_emoji --model out/emoji/flux-emoji --prompt "pizza on mint"

Captions are of the measuring half, by a real FluxPipeline with true guidance.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from stepgraph.assets.emoji_captions import BACKGROUNDS, caption
from stepgraph.assets.flux_emoji import WordEncoder, load_flux_emoji, load_retrieval
from stepgraph.assets.glyphs import contact_sheet
from stepgraph.assets.image_classifier import features_of, top_accuracy
from stepgraph.bench.emoji.captions import MEASURING, NOISE_SEEDS, captions_of
from stepgraph.bench.emoji.emoji_data import EmojiData
from stepgraph.bench.emoji.icons import rendered
from stepgraph.bench.record import write_record
from stepgraph.files.whole_file import save_figure, whole_file
from stepgraph.metrics import frechet_distance


def pictures_of(
    pipe: Any, encoder: WordEncoder, prompts: Sequence[str], *, size: int, seed: int, steps: int, guidance: float
) -> torch.Tensor:
    """One picture of each prompt, [B, 3, size, size] in -1..1 on the CPU; the noise follows from the seed."""
    generator = torch.Generator().manual_seed(seed)
    images = pipe(
        **encoder.arguments(prompts, guidance), height=size, width=size, num_inference_steps=steps, generator=generator,
        output_type="pt",
    ).images  # fmt: skip
    pictures: torch.Tensor = 2 * images.float().cpu() - 1
    return pictures


def draw_captions(path: Path, pictures: torch.Tensor, prompts: Sequence[str], columns: int = 6) -> None:
    """Pictures [B, 3, H, W] in -1..1 with their prompts beneath."""
    from matplotlib.figure import Figure

    rows = -(-len(prompts) // columns)
    figure = Figure(figsize=(1.9 * columns, 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, picture, prompt in zip(axes, pictures, prompts, strict=False):
        axis.imshow(contact_sheet(picture[None], zoom=1))
        axis.set_title(prompt, fontsize=6, y=-0.18)
    save_figure(path, figure, 130)


def main() -> None:
    """Sample; score and draw sheets, or draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("out/emoji/flux-emoji"))
    parser.add_argument("--retrieval", type=Path, default=Path("out/emoji/emoji-retrieval.safetensors"))
    parser.add_argument("--data", type=Path, default=Path("out/emoji/icons-32.npz"))
    parser.add_argument("--prompt", action="append", help="draw this only; may be given several times")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=NOISE_SEEDS[MEASURING][0], help="of the first batch's noise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/emoji"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    pipe, encoder = load_flux_emoji(arguments.model, arguments.device)
    how = {"size": 32, "steps": arguments.steps, "guidance": arguments.guidance}
    if arguments.prompt:
        pictures = pictures_of(pipe, encoder, arguments.prompt, seed=arguments.seed, **how)
        draw_captions(arguments.out / "flux-emoji-prompts.png", pictures, arguments.prompt)
        return
    network, names = load_retrieval(arguments.retrieval)
    wanted = captions_of(MEASURING, names)
    chosen = [wanted[place % len(wanted)] for place in range(arguments.samples)]
    prompts = [caption(*pair) for pair in chosen]
    parts = []
    with Progress() as progress:
        starts = range(0, len(prompts), arguments.batch)
        for number, first in progress.track(list(enumerate(starts)), description="sampling"):
            part = prompts[first : first + arguments.batch]
            parts.append(pictures_of(pipe, encoder, part, seed=arguments.seed + number, **how))
    pictures = torch.cat(parts)
    labels = torch.tensor([names.index(name) for name, _ in chosen])
    # The same captions' own pictures.
    still = EmojiData(rendered(arguments.data, 32).chosen(names)).still()
    real = still[[list(BACKGROUNDS).index(background) * len(names) + names.index(name) for name, background in chosen]]
    results = {
        "model": "flux-emoji",
        "samples": len(prompts),
        "icons": len(names),
        **how,
        "seed": arguments.seed,
        "top_1": top_accuracy(network, pictures, labels),
        "top_5": top_accuracy(network, pictures, labels, 5),
        "top_5_of_real_pictures": top_accuracy(network, real, labels, 5),
        "frechet_real": frechet_distance(features_of(network, pictures), features_of(network, real)),
    }
    write_record(arguments.out / "flux-emoji-evaluation.json", arguments.device, results)
    with whole_file(arguments.out / "flux-emoji-samples.png") as partial:
        contact_sheet(pictures[:160], columns=16).save(partial, format="png")
    draw_captions(arguments.out / "flux-emoji-captions.png", pictures[:48], prompts[:48])
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
