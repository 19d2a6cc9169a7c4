"""`stepgraph factors`, as a user and as a program would call it."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from helpers.small_glyphs import save_small_glyph_dit
from stepgraph.cli.main import app
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.forecast.correct_plan import lowrank
from stepgraph.compiler.lowrank.covariances import measure_covariances
from stepgraph.compiler.lowrank.factorize import factorize
from stepgraph.plan.factors import Factors

QUICK = ("--steps", 4, "--samples", 1, "--seed", 5)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two of glyph-dit's ten blocks."""
    return save_small_glyph_dit(tmp_path_factory.mktemp("models") / "small", layers=2)


def call(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["factors", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.stdout


def error_of(*arguments: object) -> str:
    return json.loads(call(*arguments, "--json", status=1))["error"]


def test_make_writes_what_factorize_gives(small: Path, tmp_path: Path):
    path = tmp_path / "factors.safetensors"
    facts = json.loads(
        call(
            "make",
            small,
            *QUICK,
            "--rank",
            8,
            "--period",
            "2,3",
            "--guidance",
            1.5,
            "--memory-gb",
            0.002,
            "-o",
            path,
            "--json",
        )
    )
    model, scheduler = load_model(str(small)), load_scheduler(str(small))
    measured = measure_covariances(model, scheduler, steps=4, samples=1, seed=5, guidance_scale=1.5, period=(2, 3))
    wanted, read = factorize(model, measured, rank=8), Factors.load(path)
    read.refuse_other(model)
    assert facts["digest"] == read.digest
    for name, pair in wanted.maps.items():
        assert all(torch.allclose(own, other, atol=1e-5) for own, other in zip(pair, read.maps[name], strict=True)), name
    assert facts["passes"] > 1
    assert (facts["maps"], facts["method"], facts["arguments"]["periods"]) == (12, "cov", [2, 3])
    place = facts["places"]["transformer_blocks.*.ff.net.2"]
    assert (place["maps"], place["ranks"]) == (2, [8, 8])
    assert 0 < place["error"] < 1
    shown = call("show", path)
    assert read.digest in shown
    assert "transformer_blocks.*.attn1.to_out.0" in shown
    assert json.loads(call("show", path, "--json"))["places"] == facts["places"]


@pytest.mark.parametrize("method", ["svd", "cd", "whole"])
def test_other_methods(small: Path, tmp_path: Path, method: str):
    path = tmp_path / "factors.safetensors"
    facts = json.loads(
        call(
            "make",
            small,
            *(QUICK if method != "svd" else ()),
            "--method",
            method,
            "--rank",
            4,
            "--kinds",
            "ff",
            "-o",
            path,
            "--json",
        )
    )
    assert (facts["method"], facts["maps"]) == (method, 2 if method == "whole" else 4)
    assert Factors.load(path).arguments["rank"] == 4


def test_a_budget_is_kept(small: Path, tmp_path: Path):
    facts = json.loads(call("make", small, *QUICK, "--budget", 0.2, "--sketch", 32, "-o", tmp_path / "f.safetensors", "--json"))
    assert 0.15 < facts["arguments"]["macs_share"] <= 0.2
    assert facts["arguments"]["sketch_error"] < 0.1


def test_ranks_reports_errors_on_other_runs(small: Path):
    facts = json.loads(call("ranks", small, *QUICK, "--ranks", "4,16", "--json"))
    assert 0 < facts["held_out_error"]["16"] < facts["held_out_error"]["4"] < 1
    assert facts["worse"] == {}
    assert "rank 4 " in call("ranks", small, *QUICK, "--ranks", "4", "--method", "svd", "--kinds", "attn")


def test_one_more_round_on_the_plans_own_runs(small: Path, tmp_path: Path):
    model, scheduler = load_model(str(small)), load_scheduler(str(small))
    plan = lowrank(make_plan("interval", model=model, scheduler=scheduler, steps=4, every=2, kinds=["ff"]))
    plan.save(tmp_path / "plan.json")
    first = factorize(model, method="svd", rank=4, kinds=["ff"])
    first.save(tmp_path / "plan.factors.safetensors")
    arguments = ("make", small, "--samples", 1, "--seed", 5, "--rank", 4, "--plan", tmp_path / "plan.json")
    facts = json.loads(call(*arguments, "-o", tmp_path / "next.safetensors", "--json"))
    source = measure_covariances(model, scheduler, plan=plan, factors=first, samples=1, seed=5)
    wanted = factorize(model, source, rank=4)
    assert set(wanted.maps) == set(first.maps)
    assert facts["arguments"]["plan"] == source.plan
    read = Factors.load(tmp_path / "next.safetensors")
    for name, pair in wanted.maps.items():
        assert all(torch.allclose(own, other, atol=1e-5) for own, other in zip(pair, read.maps[name], strict=True)), name
    out = ("-o", tmp_path / "none.safetensors")
    assert "the plan is of 4 steps, asked for are 9" in error_of(*arguments, "--steps", 9, *out)
    assert "period is [2], but a plan is given" in error_of(*arguments, "--period", 2, *out)


def test_options_without_effect_are_refused(small: Path, tmp_path: Path):
    make = ("make", small, "--method")
    cov = "goes with the methods cov and whole, not with the method"
    for option in ("--sketch", "--memory-gb", "--shrinkage", "--period", "--plan", "--factors"):
        assert error_of(*make, "svd", option, 1) == f"{option} {cov} svd"
        assert error_of(*make, "cd", option, 1) == f"{option} {cov} cd"
    for method in ("svd", "cov", "whole"):
        assert (
            error_of(*make, method, "--scale", "in") == f"--scale goes with the methods ca and cd, not with the method {method}"
        )
    for option in ("--steps", "--samples", "--seed", "--guidance", "--scheduler"):
        assert error_of(*make, "svd", option, 1) == f"{option} goes with sampling runs, not with the method svd"
        assert error_of(*make, "ca", "--stats", "x", option, 1) == f"{option} goes with sampling runs, not with --stats"
    assert error_of("ranks", small, "--scale", "in") == "--scale goes with the methods ca and cd, not with the method cov"
    assert "--shrinkage" in error_of("ranks", small, "--method", "svd", "--shrinkage", 0.1)
    assert error_of(*make, "cov", "--factors", "x") == "--factors goes with --plan, whose factors they are"


def test_clear_errors(small: Path, tmp_path: Path):
    out = ("-o", tmp_path / "f.safetensors")
    assert "unknown method 'pca'" in error_of("make", small, "--method", "pca", *out)
    assert "--period is 'x'; expected a whole number" in error_of("make", small, "--period", "x", *out)
    assert "--stats is for the methods ca and cd" in error_of("make", small, "--stats", tmp_path / "s", *out)
    assert "rank 200 is more than" in error_of("make", small, "--method", "svd", "--rank", 200, *out)
    assert "--ranks is '4,x'" in error_of("ranks", small, "--ranks", "4,x")
    assert "no file at" in error_of("show", tmp_path / "none")
    assert not (tmp_path / "f.safetensors").exists()
