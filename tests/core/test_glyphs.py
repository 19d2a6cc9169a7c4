"""The shipped model, its classifier and its training data."""

import diffusers
import pytest
import torch

from stepgraph.assets.glyphs import ASSETS, CLASSES, NULL_CLASS, contact_sheet, load_classifier
from stepgraph.assets.image_classifier import top_accuracy
from stepgraph.bench.glyphs.glyph_data import render
from stepgraph.bench.glyphs.train_glyphs import RECIPES, build, learning_rate, stratified_timesteps
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.metrics import psnr, relative_l2
from stepgraph.runtime.sampling.sample import sample


def test_the_shipped_model_is_diffusers_own():
    model = diffusers.DiTTransformer2DModel.from_pretrained(ASSETS / "glyph-dit", low_cpu_mem_usage=False)
    config = model.config
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (10, 2, 64)
    assert (config.sample_size, config.patch_size, config.num_embeds_ada_norm) == (24, 4, NULL_CLASS)
    size = (ASSETS / "glyph-dit" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 8e6


def test_the_shipped_scheduler_is_the_one_it_was_trained_with():
    config = load_scheduler("glyph-dit").config
    assert config.prediction_type == "v_prediction"
    assert config.beta_schedule == "squaredcos_cap_v2"
    assert not config.clip_sample


def test_the_classifier_reads_fresh_real_images():
    images, labels = render(1000, 24, seed=11)
    assert top_accuracy(load_classifier(), images.float() / 127.5 - 1, labels) >= 0.995


@pytest.mark.slow
def test_generated_glyphs_are_read_as_their_classes():
    labels = torch.arange(40) % len(CLASSES)
    noise = torch.randn(40, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    conditioning = {"class_labels": labels, "negative_class_labels": torch.full_like(labels, NULL_CLASS)}
    images = sample(load_model("glyph-dit"), load_scheduler("glyph-dit"), noise, 2.0, steps=20, **conditioning)
    assert top_accuracy(load_classifier(), images, labels) >= 0.90


def test_rendering_follows_from_the_seed():
    first, labels = render(20, 24, seed=3)
    again, _ = render(20, 24, seed=3)
    other, _ = render(20, 24, seed=4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sorted(labels.tolist()) == sorted(i % len(CLASSES) for i in range(20))


def test_the_untrained_model_predicts_zero_and_ties_its_embedder():
    model = build(RECIPES["glyph-dit"])
    inputs = {"timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
    assert model(torch.randn(1, 3, 24, 24), **inputs).sample.abs().max() == 0
    assert len({id(block.norm1.emb) for block in model.transformer_blocks}) == 1


def test_the_learning_rate_warms_up_and_falls_to_its_floor():
    recipe = RECIPES["glyph-dit"]
    assert learning_rate(0, recipe) == pytest.approx(1 / 150)
    assert learning_rate(150, recipe) == pytest.approx(1.0)
    assert learning_rate(recipe.steps, recipe) == pytest.approx(0.02)


def test_stratified_timesteps_take_one_from_each_stratum():
    steps = stratified_timesteps(50, torch.device("cpu"))
    assert torch.equal(steps // 20, torch.arange(50))


def test_contact_sheets_hold_every_pixel():
    images = torch.rand(3, 3, 4, 4) * 2 - 1
    sheet = contact_sheet(images, columns=2, zoom=1)
    assert sheet.size == (8, 8)
    expected = tuple(((images[2, :, 1, 3] / 2 + 0.5) * 255).round().int().tolist())
    assert sheet.getpixel((3, 5)) == expected
    assert sheet.getpixel((5, 5)) == (0, 0, 0)


def test_metrics_by_hand():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert relative_l2(reference + torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reference) == pytest.approx((0.2 + 0.5) / 2)
    black, grey = -torch.ones(1, 3, 2, 2), torch.full((1, 3, 2, 2), -0.8)
    assert psnr(grey, black) == pytest.approx(20.0)
    assert psnr(black, black) == float("inf")
