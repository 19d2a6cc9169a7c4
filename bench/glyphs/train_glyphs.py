"""Train the glyph classifier and the small diffusion transformer glyph-dit.

    python -m stepgraph.bench.glyphs.train_glyphs classifier
    python -m stepgraph.bench.glyphs.train_glyphs glyph-dit            # about an hour on two CPU cores

Each run writes its weights (`save_pretrained` layout, fp16), the loss curve and, for a transformer, a contact sheet
into --out. A killed run continues from its last checkpoint. The transformer is diffusers' own DiTTransformer2DModel,
trained on v-prediction with its embedder tied across blocks (it is stored once per block, as diffusers expects).
"""

import argparse
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn

from stepgraph.assets.glyphs import NULL_CLASS, glyph_classifier
from stepgraph.bench.glyphs.glyph_data import Warp, render
from stepgraph.bench.record import write_record
from stepgraph.bench.training import Training, plot_losses

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Recipe:
    """One transformer and how it is trained."""

    size: int
    patch: int
    heads: int
    layers: int
    steps: int
    batch: int
    learning_rate: float
    images: int
    warp: Warp = field(default_factory=Warp)


RECIPES = {
    "glyph-dit": Recipe(24, 4, heads=2, layers=10, steps=8000, batch=64, learning_rate=1.5e-3, images=30_000),
}  # fmt: skip


def scheduler() -> DDIMScheduler:
    """The noise schedule that both transformers are trained and sampled with."""
    return DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def build(recipe: Recipe) -> DiTTransformer2DModel:
    """The untrained transformer: adaLN-zero initialised, one embedder for all blocks, its own label dropout off."""
    model = DiTTransformer2DModel(
        num_attention_heads=recipe.heads,
        attention_head_dim=64,
        in_channels=3,
        num_layers=recipe.layers,
        sample_size=recipe.size,
        patch_size=recipe.patch,
        num_embeds_ada_norm=NULL_CLASS,
        norm_eps=1e-6,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.data.flatten(1))
    embedder = model.transformer_blocks[0].norm1.emb
    for linear in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
    embedder.class_embedder.dropout_prob = 0.0
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        block.norm1.emb = embedder
    for linear in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
    return model


def learning_rate(step: int, recipe: Recipe, warm_up: int = 150, floor: float = 0.02) -> float:
    """Factor on the peak rate: linear warm-up, then a cosine down to `floor`."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, recipe.steps - warm_up)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def stratified_timesteps(batch: int, device: torch.device) -> torch.Tensor:
    """One uniform timestep from each of `batch` equal strata, [batch] int64."""
    return ((torch.arange(batch, device=device) + torch.rand(batch, device=device)) * TRAIN_STEPS / batch).long()


def train_transformer(name: str, out: Path, device: torch.device, limit_s: float) -> bool:
    """Train `name` for at most `limit_s` seconds; returns whether its recipe is complete, and if so writes it."""
    recipe = RECIPES[name]
    torch.manual_seed(0)
    images, labels = render(recipe.images, recipe.size, seed=1, warp=recipe.warp)
    images, labels = images.to(device), labels.to(device)
    model = build(recipe).to(device)
    if device.type == "cpu":
        for block in model.transformer_blocks:  # the fused attention's bf16 backward takes half of a step on the CPU
            block.attn1.set_processor(AttnProcessor())
    noise_schedule = scheduler()
    training = Training(
        [model], out / f"{name}.checkpoint.pt", asdict(recipe), rate=recipe.learning_rate, keep=0.999, device=device,
        total=recipe.steps,
    )  # fmt: skip

    def loss() -> torch.Tensor:
        pick = torch.randint(len(images), (recipe.batch,), device=device)
        clean = images[pick].float() / 127.5 - 1
        noise, timestep = torch.randn_like(clean), stratified_timesteps(recipe.batch, device)
        dropped = torch.rand(recipe.batch, device=device) < 0.1
        label = torch.where(dropped, NULL_CLASS, labels[pick])
        noisy = noise_schedule.add_noise(clean, noise, timestep)
        target = noise_schedule.get_velocity(clean, noise, timestep)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(noisy, timestep=timestep, class_labels=label).sample
        error: torch.Tensor = (predicted.float() - target).square().mean()
        return error

    if not training.run(name, loss, lambda: learning_rate(training.step, recipe), limit_s):
        return False
    training.use_average()
    finish(name, recipe, model, training.losses, out, str(device))
    training.checkpoint.unlink(missing_ok=True)
    return True


def finish(name: str, recipe: Recipe, model: nn.Module, losses: list[float], out: Path, device: str) -> None:
    """Write the averaged weights in `save_pretrained` layout, the scheduler, the losses and their curve."""
    # Untie: a stored model holds one embedder per block, and safetensors refuses shared tensors.
    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    untied = DiTTransformer2DModel.from_config(model.config)
    untied.load_state_dict(state)
    untied.half().save_pretrained(out / name)
    scheduler().save_pretrained(out / name)
    results = {"recipe": asdict(recipe), "losses": [round(value, 5) for value in losses[::10]]}
    write_record(out / f"{name}-training.json", device, results)
    plot_losses(name, losses, out / f"{name}-loss.png", "MSE of v")


def train_classifier(out: Path, device: torch.device, size: int = 24, epochs: int = 6) -> float:
    """Train the classifier on both transformers' image sizes; returns its accuracy on fresh 24 x 24 images."""
    torch.manual_seed(0)
    images, labels = render(30_000, size, seed=1)
    model = glyph_classifier().to(device)
    batch, total = 128, epochs * len(images) // 128
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    with Progress() as progress:
        for _ in progress.track(range(total), description="classifier"):
            pick = torch.randint(len(images), (batch,))
            inputs = images[pick].to(device).float() / 127.5 - 1
            inputs += 0.15 * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(inputs)
            loss = nn.functional.cross_entropy(model(inputs), labels[pick].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    test_images, test_labels = render(10_000, size, seed=2)
    with torch.inference_mode():
        guess = torch.cat([model(part.to(device).float() / 127.5 - 1).argmax(1).cpu() for part in test_images.split(500)])
    save_file(
        {key: value.cpu().contiguous() for key, value in model.state_dict().items()},
        out / "glyph-classifier.safetensors",
    )
    return (guess == test_labels).float().mean().item()


def main() -> None:
    """Command line; exit status 3 says that the time ran out and a checkpoint was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("classifier", *RECIPES))
    parser.add_argument("--out", type=Path, default=Path("out/training"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=math.inf, help="stop after this many seconds, leaving a checkpoint")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    if arguments.what == "classifier":
        print(f"accuracy on 10,000 fresh images: {train_classifier(arguments.out, device):.4f}")
    elif not train_transformer(arguments.what, arguments.out, device, arguments.limit):
        raise SystemExit(3)


if __name__ == "__main__":
    main()
