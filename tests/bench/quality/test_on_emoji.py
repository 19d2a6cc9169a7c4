import json
import sys
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from helpers.distance import SAME_RUN, error
from stepgraph.assets.emoji_captions import caption
from stepgraph.assets.flux_emoji import load_flux_emoji
from stepgraph.bench.emoji.captions import CALIBRATION, MEASURING, captions_of
from stepgraph.bench.quality import corrections, on_emoji
from stepgraph.bench.quality.on_emoji import EmojiHost
from stepgraph.compiler.calibration.calibrate import calibrate
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.models.flux import sigmas

# InvarDiff measures the model once more for its second phase.
POLICIES = ("MagCache", "InvarDiff")


@pytest.fixture(scope="module")
def host() -> EmojiHost:
    return EmojiHost("flow-euler", 4, 2.0, seeds=(0, 1), per_seed=2)


def test_the_host_samples_as_the_pipeline_does(host):
    pipe, encoder = load_flux_emoji()
    prompts = [caption(*pair) for pair in captions_of(MEASURING, host.icons)[:4]]
    noise = torch.cat([torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    images = pipe(
        **encoder.arguments(prompts, 2.0), height=32, width=32, num_inference_steps=4, latents=noise, output_type="pt"
    ).images
    assert error((host.pictures(host.reference) / 2 + 0.5).clamp(0, 1), images) < SAME_RUN


def test_what_is_fitted_has_captions_of_the_other_half(host):
    _, encoder = load_flux_emoji()
    wanted = encoder.encode([caption(*pair) for pair in captions_of(CALIBRATION, host.icons)[:3]])
    assert torch.equal(host.fits(3, 0)["conditioning"]["encoder_hidden_states"], wanted["prompt_embeds"])
    assert not [name for name in host.watched(3, 0)["conditioning"] if name.startswith("negative_")]


def test_what_factors_are_made_of_is_measured_on_the_plans_timesteps(host, monkeypatch):
    monkeypatch.setattr(corrections, "SAMPLES", 1)
    shop = corrections.Workshop(host)
    planned = shop.interval(2).header
    assert shop.stats.header.timesteps == shop.covariances(2, False).header.timesteps == planned.timesteps


def test_routers_are_trained_on_runs_of_the_other_half(host, tmp_path):
    with Progress(disable=True) as progress:
        router = host.trained_router(progress, "", iterations=1, batch=2, pool=2, label_dropout=0.5)
    shift = host.scheduler.config.shift
    assert router.header.timesteps == pytest.approx([1000 * shift * s / (1 + (shift - 1) * s) for s in sigmas(4)])
    # The second of each pair of steps is routed.
    assert (router.logits != 0).any(dim=1).tolist() == [False, True, False, True]
    router.save(tmp_path / "router.safetensors")
    stats = calibrate(host.model, host.scheduler, schedule=host.schedule(4), channels=False, **host.watched(1, 0))
    plan = make_plan("l2c", stats, router=str(tmp_path / "router.safetensors"), theta=1.0)
    assert host.images(host.compiled(plan)).isfinite().all()
    assert 1.5 < plan.summary().ideal_speedup < 2


@pytest.mark.slow
def test_the_bench_runs_and_writes_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = ["on_emoji", "--steps", "4", "--samples", "2", "--out", str(tmp_path), "--only", *POLICIES, "--routers"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(on_emoji, "SAMPLES", 1)
    monkeypatch.setattr(on_emoji, "METHODS", ("svd",))
    monkeypatch.setattr(corrections, "SAMPLES", 1)
    on_emoji.main()
    rows = json.loads((tmp_path / "quality-flux-emoji-4.json").read_text())["results"]["rows"]
    others = {"other seed", "fewer steps", "fewer steps, 2nd order", "Taylor 1", "whole step", "LOWRANK svd"}
    assert {row["name"] for row in rows} == {*POLICIES, *others}
    for row in rows:
        assert "impossible" not in row
        assert row["relative_l2"] <= row["p95"] * 1.01 <= row["largest"] * 1.02
    assert (tmp_path / "quality-flux-emoji-4.png").read_bytes()[:4] == b"\x89PNG"
