"""Commands that load a model, once on the shipped one, which is small; what they do in full is tried on two of its blocks.

`run`, `compile`, `plan make`, `plan correct` and `demo` meet the shipped model where they are tested.
"""

import json
from pathlib import Path

import pytest

from helpers.command_line import invoke
from helpers.distance import SAME_RUN
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.routers.router import Router
from stepgraph.plan import CachePlan
from stepgraph.plan.factors import Factors

BLOCKS = 10


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    invoke("plan", "make", "--policy", "interval", "--steps", 2, "-a", "every=2", "-o", path)
    return path


def test_calibrate(tmp_path: Path):
    path = tmp_path / "stats.safetensors"
    invoke("calibrate", "glyph-dit", "--steps", 2, "--samples", 1, "--no-channels", "-o", path)
    assert len([site for site in CalibrationStats.load(path).sites if site.name.endswith(".ff")]) == BLOCKS


def test_factors_make_and_ranks(tmp_path: Path):
    path = tmp_path / "factors.safetensors"
    few = ("glyph-dit", "--steps", 2, "--samples", 1)
    invoke("factors", "make", *few, "--method", "whole", "--rank", 2, "-o", path)
    assert len([name for name in Factors.load(path).maps if name.endswith(".ff")]) == BLOCKS
    assert "rank 2 " in invoke("factors", "ranks", *few, "--ranks", "2", "--method", "svd", "--kinds", "attn")


def test_plan_sweep(tmp_path: Path):
    facts = json.loads(
        invoke(
            *("plan", "sweep", "--model", "glyph-dit", "--policy", "interval", "--knob", "every", "--values", "1,2"),
            *("--steps", 2, "--samples", 1, "--plot", tmp_path / "sweep.png", "--json"),
        )
    )
    full, reused = facts["points"]
    assert full["error"] < SAME_RUN < reused["error"]


def test_plan_train_router(tmp_path: Path):
    path = tmp_path / "router.safetensors"
    few = ("-a", "iterations=1", "-a", "pool=2", "-a", "batch=2")
    invoke("plan", "train-router", "glyph-dit", "--steps", 2, *few, "-o", path)
    assert len([site for site in Router.load(path).sites if site.name.endswith(".ff")]) == BLOCKS


def test_plan_resample(plan: Path, tmp_path: Path):
    path = tmp_path / "longer.json"
    invoke("plan", "resample", plan, "--steps", 4, "--model", "glyph-dit", "-o", path)
    assert ["R" in row for row in CachePlan.load(path).rows] == [False, True, False, True]


def test_plan_import(plan: Path, tmp_path: Path):
    schedule, path = tmp_path / "schedule.json", tmp_path / "again.json"
    invoke("plan", "export", plan, "--format", "smoothcache", "-o", schedule)
    invoke("plan", "import", schedule, "--model", "glyph-dit", "--steps", 2, "-o", path)
    assert CachePlan.load(path).rows == CachePlan.load(plan).rows


def test_export(plan: Path, tmp_path: Path):
    invoke("export", "glyph-dit", "--plan", plan, "--format", "graph", "--out", tmp_path / "graphs")
    drawing = next((tmp_path / "graphs").glob("*.dot")).read_text()
    assert f"transformer_blocks.{BLOCKS - 1}.ff" in drawing
