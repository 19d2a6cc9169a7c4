"""The quality bench: its metrics, its baseline, and a small real run of it."""

import json
import sys

import numpy as np
import pytest
import torch

from helpers.small_glyphs import small_glyph_dit
from stepgraph.bench.quality.paired import Host
from stepgraph.bench.quality.quality import KNOBS, TARGETS, against_fewer_steps, fewer_steps, front, main, tuned
from stepgraph.compiler.calibration.calibrate import calibrate
from stepgraph.metrics import frechet_distance
from stepgraph.runtime.sampling.sample import sample


def test_frechet_distance_against_its_formula():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(300, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    # Scaling and shifting change means and covariances in a known way.
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    spread = float(torch.cov((first - first.mean(0)).double().T).trace())
    moved = first - first.mean(0)
    assert frechet_distance(moved, 3 * moved + shift) == pytest.approx(float(shift.square().sum()) + 4 * spread, rel=1e-6)
    # Covariances that do not commute: the trace of the root from the eigenvalues of their product.
    second = torch.randn(200, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    one, two = (np.cov(features.double().numpy(), rowvar=False) for features in (first, second))
    means = (first.double().mean(0) - second.double().mean(0)).square().sum().item()
    root = np.sqrt(np.linalg.eigvals(one @ two).real.clip(0)).sum()
    assert frechet_distance(first, second) == pytest.approx(means + np.trace(one) + np.trace(two) - 2 * root, rel=1e-9)


def test_the_baseline_is_the_best_of_fewer_steps():
    measured = [(2.0, 0.04), (4.0, 0.16), (1.6, 0.05), (3.0, 0.2), (1.25, 0.01)]
    rows = [{"name": "fewer steps", "fewer_macs": fewer, "relative_l2": error} for fewer, error in measured]
    # A third of the MACs is worse than a quarter, five eighths worse than half: nobody would take them.
    points = front([*rows, {"name": "other", "fewer_macs": 9.0, "relative_l2": 0.0}])
    assert points == [(0.25, 0.16), (0.5, 0.04), (0.8, 0.01)]
    rows += [{"name": "plan", "target": 2.0, "fewer_macs": 2.0, "relative_l2": 0.02}, {"name": "none", "target": 2.0}]
    against_fewer_steps(rows)
    assert rows[-2]["versus_fewer_steps"] == pytest.approx(0.5)
    assert "versus_fewer_steps" not in rows[-1]
    for steps in (20, 50):
        counts = fewer_steps(steps)
        # Every target lies between the step counts measured, with room for plans that miss it.
        assert counts[0] < steps / 3.2
        assert counts[-1] > steps / 1.6
        assert {round(steps / target) for target in TARGETS} <= set(counts)


@pytest.fixture(scope="module")
def host() -> Host:
    return Host("ddim", 6, 1.5, seeds=(0, 1), per_seed=2)


def test_a_comparison_by_hand(host):
    noise = torch.cat([torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    labels = torch.tensor([0, 1, 0, 1])
    given = {"class_labels": labels, "negative_class_labels": torch.full((4,), 10)}
    assert torch.allclose(host.reference, sample(host.model, host.scheduler, noise, 1.5, steps=6, **given), atol=1e-5)
    other = host.reference + torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1, 1)
    errors = [0.1 * (i + 1) * (3 * 24 * 24) ** 0.5 / host.reference[i].double().norm().item() for i in range(4)]
    found = host.compare(other)
    assert found["relative_l2"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert found["standard_error"] == pytest.approx(np.std(errors, ddof=1) / 2, rel=1e-5)
    assert found["seed_spread"] == pytest.approx(np.std([np.mean(errors[:2]), np.mean(errors[2:])], ddof=1), rel=1e-5)
    same = host.compare(host.reference)
    assert (same["relative_l2"], same["feature_distance"]) == (0, 0)


@pytest.fixture(scope="module")
def stats(host):
    return calibrate(host.model, host.scheduler, steps=12, samples=1, channels=False)


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_saves_more_as_it_grows(stats, name):
    saved = [tuned(KNOBS[name], stats, target)[1].summary().ideal_speedup for target in TARGETS]
    assert saved == sorted(saved)
    assert saved[-1] > 1.5


@pytest.mark.slow
def test_the_bench_runs_and_writes_its_record(tmp_path, monkeypatch):
    command = [
        "quality", "--steps", "6", "--samples", "4", "--finalists", "4", "--calibration", "1", "--routers",
        "--only", "FORA (interval)", "InvarDiff", "--out", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(Host, "loaded", lambda host: small_glyph_dit(2))
    main()
    record = json.loads((tmp_path / "quality-ddim-6.json").read_text())
    rows = record["results"]["rows"]
    measured = {"fewer_macs", "relative_l2", "standard_error", "seed_spread", "psnr", "feature_distance"}
    assert {row["name"] for row in rows} == {"other seed", "fewer steps", "FORA (interval)", "InvarDiff"}
    for row in rows:
        more = {"knob", "target", "versus_fewer_steps", "rows"} if "target" in row else set()
        assert "impossible" in row or row.keys() >= measured | more
    fora = next(row for row in rows if row["name"] == "FORA (interval)")
    assert 1.9 < fora["fewer_macs"] <= 2.0
    assert 0 < fora["relative_l2"] < next(row for row in rows if row["name"] == "other seed")["relative_l2"]
    assert fora["versus_fewer_steps"] is None or fora["versus_fewer_steps"] > 0
    final = record["results"]["finalists"]["rows"]
    assert {row["name"] for row in final} > {"full", "fewer steps"}
    assert all(row.keys() >= {"fewer_macs", "relative_l2", "accuracy", "frechet_real", "frechet_full"} for row in final)
    assert (tmp_path / "quality-ddim-6.png").read_bytes()[:4] == b"\x89PNG"
