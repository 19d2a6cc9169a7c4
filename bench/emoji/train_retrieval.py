"""Train the network that says which icon a picture shows: the retrieval score of flux-emoji, and the features of its metrics.

    python -m stepgraph.bench.emoji.train_retrieval

It is trained on pictures on the named backgrounds, a little shifted and scaled, with noise and blur as generated ones may have,
and tested on backgrounds and shifts that it has not seen. It writes the weights, with the icons' names, and what the test said.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.progress import Progress
from torch import nn

from stepgraph.assets.flux_emoji import load_retrieval, retrieval_network
from stepgraph.assets.image_classifier import ImageClassifier, top_accuracy
from stepgraph.bench.emoji.captions import distinct_names
from stepgraph.bench.emoji.emoji_data import EmojiData, Jitter, unseen
from stepgraph.bench.emoji.icons import Icons, rendered
from stepgraph.bench.record import write_record
from stepgraph.files.whole_file import save_tensors

NEAR = Jitter(shift=1.5, scale=(0.88, 1.03), mirrored=0.5)


def train_retrieval(icons: Icons, steps: int, device: torch.device, batch: int = 128, rate: float = 3e-3) -> ImageClassifier:
    """Train it; the seed is fixed."""
    torch.manual_seed(0)
    network = retrieval_network(len(icons.names)).to(device)
    data = EmojiData(icons, device)
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    with Progress() as progress:
        for _ in progress.track(range(steps), description="retrieval"):
            drawn = data.batch(batch, NEAR)
            loss = nn.functional.cross_entropy(network(blemished(drawn.pictures)), drawn.icons, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def blemished(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W], half of them blurred, in other tints, with noise of a random strength, clamped to -1..1."""
    count = len(pictures)
    blurred = nn.functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    picked = (torch.rand(count, 1, 1, 1) < 0.5).to(pictures.device)
    tint = 0.2 * (torch.rand(count, 3, 1, 1) - 0.5).to(pictures.device)
    noise = 0.15 * torch.rand(count, 1, 1, 1).to(pictures.device) * torch.randn_like(pictures)
    return (torch.where(picked, blurred, pictures) + tint + noise).clamp(-1, 1)


def save_retrieval(network: ImageClassifier, icons: Icons, path: Path) -> None:
    """Write it in fp16, with the icons' names."""
    tensors = {key: value.detach().half().cpu().contiguous() for key, value in network.state_dict().items()}
    save_tensors(path, tensors, {"names": json.dumps(icons.names)})


def main() -> None:
    """Train, write and test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=int, default=512, help="how many of the most distinct ones")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--data", type=Path, default=Path("out/emoji/icons-32.npz"))
    parser.add_argument("--out", type=Path, default=Path("out/emoji"))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    icons = rendered(arguments.data, 32).chosen(distinct_names(arguments.icons))
    path = arguments.out / "emoji-retrieval.safetensors"
    save_retrieval(train_retrieval(icons, arguments.steps, torch.device(arguments.device)), icons, path)
    network, _ = load_retrieval(path)
    test = unseen(icons, 10_000, seed=3)
    tops = {f"top_{count}_unseen": top_accuracy(network, test.pictures, test.icons, count) for count in (1, 5)}
    write_record(
        arguments.out / "emoji-retrieval.json", arguments.device, {"icons": len(icons.names), "steps": arguments.steps, **tops}
    )
    print(json.dumps(tops))


if __name__ == "__main__":
    main()
