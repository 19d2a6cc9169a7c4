"""Train the glyph classifier and the small diffusion transformers glyph-dit and glyph-dit-l.

    python -m stepgraph.bench.glyphs.train_glyphs classifier
    python -m stepgraph.bench.glyphs.train_glyphs glyph-dit            # about an hour on two CPU cores
    python -m stepgraph.bench.glyphs.train_glyphs glyph-dit-l --device cuda

Each run writes its weights (`save_pretrained` layout, fp16), the loss curve and, for a transformer, a contact sheet
into --out. A killed run continues from its last checkpoint. The transformer is diffusers' own DiTTransformer2DModel,
trained on v-prediction with its embedder tied across blocks (it is stored once per block, as diffusers expects).
"""

import argparse
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn

from stepgraph.assets.glyphs import NULL_CLASS, GlyphClassifier
from stepgraph.bench.glyphs.glyph_data import Warp, render
from stepgraph.bench.record import write_record

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
    "glyph-dit-l": Recipe(
        32, 2, heads=3, layers=9, steps=30_000, batch=256, learning_rate=1e-3, images=100_000,
        warp=Warp(rotation=25, shear=0.25, scale=(0.7, 1.15), shift=3.0),
    ),
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


def rng_state(device: torch.device) -> list[torch.Tensor]:
    """The random state of the CPU and, where it is used, of the CUDA device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def restore_rng(state: list[torch.Tensor]) -> None:
    """Continue the random numbers where `rng_state` was taken."""
    torch.set_rng_state(state[0].cpu())
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1].cpu())


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
    ema = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    noise_schedule = scheduler()
    checkpoint, step, losses = out / f"{name}.checkpoint.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, losses = state["ema"], state["step"], state["losses"]
        restore_rng(state["rng"])

    def save_checkpoint() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step}
        partial = checkpoint.with_suffix(".partial")
        torch.save(state | {"losses": losses, "rng": rng_state(device)}, partial)
        partial.replace(checkpoint)

    model.train()
    started = saved = time.monotonic()
    with Progress(*Progress.get_default_columns()) as progress:
        bar = progress.add_task(name, total=recipe.steps, completed=step)
        while step < recipe.steps and time.monotonic() - started < limit_s:
            pick = torch.randint(len(images), (recipe.batch,), device=device)
            clean = images[pick].float() / 127.5 - 1
            noise, timestep = torch.randn_like(clean), stratified_timesteps(recipe.batch, device)
            dropped = torch.rand(recipe.batch, device=device) < 0.1
            label = torch.where(dropped, NULL_CLASS, labels[pick])
            noisy = noise_schedule.add_noise(clean, noise, timestep)
            target = noise_schedule.get_velocity(clean, noise, timestep)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate(step, recipe)
            with torch.autocast(device.type, torch.bfloat16):
                predicted = model(noisy, timestep=timestep, class_labels=label).sample
            loss = (predicted.float() - target).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                keep = min(0.999, (step + 1) / (step + 10))
                parameters = dict(model.named_parameters())
                torch._foreach_lerp_([ema[key] for key in parameters], list(parameters.values()), 1 - keep)
            losses.append(loss.item())
            step += 1
            recent = sum(losses[-100:]) / len(losses[-100:])
            progress.update(bar, completed=step, description=f"{name} loss {recent:.4f}")
            if time.monotonic() - saved > 60:
                save_checkpoint()
                print(f"step {step} loss {recent:.4f}", flush=True)
                saved = time.monotonic()
    if step < recipe.steps:
        save_checkpoint()
        return False
    finish(name, recipe, ema, losses, out, str(device))
    checkpoint.unlink(missing_ok=True)
    return True


def finish(name: str, recipe: Recipe, ema: dict[str, torch.Tensor], losses: list[float], out: Path, device: str) -> None:
    """Write the averaged weights in `save_pretrained` layout, the scheduler, the losses and their curve."""
    model = build(recipe)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(ema[key])
    # Untie: a stored model holds one embedder per block, and safetensors refuses shared tensors.
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    untied = DiTTransformer2DModel.from_config(model.config)
    untied.load_state_dict(state)
    untied.half().save_pretrained(out / name)
    scheduler().save_pretrained(out / name)
    results = {"recipe": asdict(recipe), "losses": [round(value, 5) for value in losses[::10]]}
    write_record(out / f"{name}-training.json", device, results)
    plot_losses(name, losses, out / f"{name}-loss.png")


def plot_losses(name: str, losses: list[float], path: Path) -> None:
    """The training loss and its running mean over 100 steps, as a picture."""
    import matplotlib.pyplot as plt

    series = torch.tensor(losses)
    smooth = series.unfold(0, min(100, len(losses)), 1).mean(1)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.semilogy(series, lw=0.4, alpha=0.4, label="per batch")
    axes.semilogy(range(len(losses) - len(smooth), len(losses)), smooth, lw=1.5, label="mean of 100")
    axes.set(xlabel="training step", ylabel="MSE of v", title=f"{name}: final {smooth[-1]:.4f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def train_classifier(out: Path, device: torch.device, size: int = 24, epochs: int = 6) -> float:
    """Train the classifier on both transformers' image sizes; returns its accuracy on fresh 24 x 24 images."""
    torch.manual_seed(0)
    images, labels = render(30_000, size, seed=1)
    model = GlyphClassifier().to(device)
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
