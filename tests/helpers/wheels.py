"""Wheels of a copy of the sources: builds leave files behind, and would take old ones from earlier builds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.once import once
from helpers.paths import ROOT

# The installed package may be tested without its checkout's history, so the copy follows names and not git.
LEFT_OUT = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__", "docs", "tests", "results", "*.so")


def build_wheel(folder: Path, **variables: str) -> Path:
    """Build one in a folder, with some environment variables."""
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    options = ["-q", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-w", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(folder / "source")]
    result = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("stepgraph-*.whl"))


def shared_wheel(factory: pytest.TempPathFactory) -> Path:
    """The wheel that users get, with the native library where there is a compiler; built once in a run of the tests."""
    return next(once(factory, "wheel", build_wheel).glob("stepgraph-*.whl"))
