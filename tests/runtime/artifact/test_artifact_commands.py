"""Artifacts on the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from stepgraph.cli.main import app


@pytest.mark.slow
def test_compile_saves_and_run_takes_it(tmp_path: Path):
    def invoke(*arguments: object) -> dict:
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    plan, artifact = tmp_path / "plan.json", tmp_path / "artifact.zip"
    invoke("plan", "make", "--policy", "interval", "--steps", 4, "-a", "every=2", "-o", plan)
    saved = invoke("compile", "glyph-dit", "--plan", plan, "--backend", "eager", "--save", artifact, "--with-weights")
    assert saved["saved"] == str(artifact)
    invoke("run", "glyph-dit", "--plan", plan, "--images", 1, "--out", tmp_path / "plain")
    invoke("run", "--artifact", artifact, "--images", 1, "--out", tmp_path / "saved")
    first, second = (load_file(tmp_path / name / "samples.safetensors")["latents"] for name in ("plain", "saved"))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "either a model with --plan, or --artifact"),
        (["run", "--artifact", "a.zip", "--plan", "p.json"], "--plan goes with a model, not with --artifact"),
        (["run", "--artifact", "a.zip", "--backend", "eager"], "--backend goes with a model, not with --artifact"),
        (["run", "--artifact", "nowhere.zip"], "no artifact at nowhere.zip"),
        (["compile", "glyph-dit", "--plan", "p.json", "--with-weights"], "--with-weights goes with --save"),
    ],
)
def test_a_command_that_does_not_say_what_to_do_is_refused(arguments: list[str], said: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 1
    assert said in json.loads(result.stdout)["error"]
