"""The unattended GPU script says how it is used, and never pretends to have a device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT

SCRIPT = ROOT / "bench" / "gpu_suite.sh"

needs_no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def suite(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_is_valid_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("arguments", [(), ("tests",), ("tests", "a", "b", "c")])
def test_prints_usage(arguments: tuple[str, ...], tmp_path: Path):
    result = suite(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert "usage: bench/gpu_suite.sh PART OUT [WHEELS]" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_refuses_unknown_part(tmp_path: Path):
    result = suite("everything", tmp_path / "out")
    assert result.returncode == 2
    assert "unknown part 'everything'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_refuses_missing_wheels(tmp_path: Path):
    assert suite("tests", tmp_path / "out", tmp_path / "absent").returncode == 2


@needs_no_device
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("train", ["train"]),
        ("all", ["tests", "demo", "ops", "lowrank", "runtime", "compile"]),
    ],
)
def test_fails_without_a_device(part: str, expected: list[str], tmp_path: Path):
    result = suite(part, "out", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("no CUDA device") == len(expected)
    written = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert [(row["part"], row["status"], row["exit"]) for row in written["parts"]] == [
        (name, "no CUDA device", 1) for name in expected
    ]
    assert written["device"] is None
    assert written["command"] == f"bench/gpu_suite.sh {part} out"
    assert set(written) >= {"driver", "python", "commit", "started", "seconds"}
    assert written["versions"]["torch"] == torch.__version__
    assert set(written["versions"]) == {"torch", "triton", "diffusers", "stepgraph"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["suite.json"]
