"""The unattended GPU script says how it is used, and never pretends to have a device."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from helpers.children import environment
from helpers.paths import ROOT

SCRIPT = ROOT / "bench" / "gpu_suite.sh"

needs_no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def suite(*arguments: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    around = environment(PYTHON=sys.executable, **variables)
    return subprocess.run(command, cwd=cwd, env=around, capture_output=True, text=True, check=False)


def test_is_valid_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize(
    "arguments", [(), ("tests",), ("tests", "a", "b", "c"), ("prove",), ("prove", "--fast", "a"), ("prove", "--only")]
)
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


@pytest.mark.parametrize("arguments", [("out", "absent"), ("out", "", "absent")])
def test_prove_refuses_missing_folders(arguments: tuple[str, ...], tmp_path: Path):
    assert suite("prove", "--tiny", *arguments, cwd=tmp_path).returncode == 2


@pytest.mark.slow
def test_every_part_of_prove_is_rehearsed(tmp_path: Path):
    """One call; each part writes rows, stand-ins and what is absent are told, and OUT can be carried off."""
    result = suite("prove", "--tiny", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert all(path.is_file() and path.stat().st_size < 2**24 for path in files)
    written = json.loads((tmp_path / "out" / "prove.json").read_text())
    assert [(part["part"], part["status"]) for part in written["parts"]] == [
        (name, "ok") for name in ("tests", "dit1", "flux", "dit16", "kernels", "whole")
    ]
    assert set(written) >= {"device", "driver", "torch", "versions", "commit", "command", "absent"}
    rows = written["rows"]
    assert not [row for part in rows.values() for row in part if "failed" in row]
    assert rows["tests"]["tests"]["skipped"] > 100
    assert rows["tests"]["tests"]["failed"] == 0
    assert set(rows["dit1"]) >= {"eager", "regional", "cache-dit mask", "ours full, loop", "ours full, graph"}
    assert "stand_in" in rows["dit1"]["ours full, graph"]
    assert "stand_in" in rows["kernels"]["modulated_norm, 16, 16"]
    assert rows["flux"]["ours fast book"]["plan"].startswith("interval of 3")
    assert rows["flux"]["ours full"]["first_step_error"] < 1e-5
    verdicts = {row["what"]: row["verdict"] for row in written["table"]}
    assert set(verdicts.values()) <= {"rehearsed", "reported", "not measured"}
    assert verdicts["FLUX: fast book, x eager"] == "rehearsed"
    # What is not measured on a CPU: torch.compile of the kernels, and sizes that a rehearsal leaves out.
    assert all("x torch.compile" in what or "copy bandwidth" in what for what, verdict in verdicts.items()
               if verdict == "not measured")  # fmt: skip
    assert "measured against bar" in (tmp_path / "out" / "prove.txt").read_text()


def test_wheels_of_names_are_collected(tmp_path: Path):
    """From a folder in place of an index: a wheel of any Python is taken, one of another version of Python is not there."""
    for name in ("one", "other"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    result = suite("wheels", "out", "one", cwd=tmp_path, **offline)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one-1.0-py3-none-any.whl"]


@needs_no_device
@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("prove", ["prove"]),
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
