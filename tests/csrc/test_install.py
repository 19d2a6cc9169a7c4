"""The native library is optional: installing goes on without a compiler, and what is missing is said."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import stepgraph.csrc.library as library_module
from helpers.wheels import build_wheel, shared_wheel
from stepgraph import csrc, ops
from stepgraph.cli import doctor
from stepgraph.csrc import limits
from stepgraph.csrc.library import FOLDER, Native, load, native


def test_wheel_is_built_without_a_compiler(tmp_path: Path):
    names = zipfile.ZipFile(build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false")).namelist()
    assert "stepgraph/csrc/library.py" in names
    assert [name for name in names if "_native" in name] == []


@pytest.mark.slow
def test_wheel_holds_a_library_that_loads(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("no C++ compiler here")
    wheel = shared_wheel(tmp_path_factory)
    assert "-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if name.startswith("stepgraph/csrc/")]
        archive.extractall(tmp_path / "site", inside)
    found = load(tmp_path / "site" / "stepgraph" / "csrc")
    assert found.missing == ""
    assert found.library is not None


@pytest.mark.skipif(native().library is None, reason="no native library here")
def test_library_of_other_sources_is_refused(tmp_path: Path):
    for file in [*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), *FOLDER.glob("_native*.so")]:
        shutil.copy(file, tmp_path)
    assert load(tmp_path).missing == ""
    (tmp_path / "vector.h").write_text("// changed\n")
    found = load(tmp_path)
    assert found.library is None
    assert found.missing == "the native library was built from other sources than these"


def test_broken_library_is_refused(tmp_path: Path):
    assert load(tmp_path) == Native(None, "none", "the native library was not built", library_module.REINSTALL)
    (tmp_path / "_native.abi3.so").write_bytes(b"no library")
    assert load(tmp_path).missing.startswith("the native library cannot be loaded (")


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    """As if the package had been installed without a compiler."""
    ops.load_providers()
    missing = load(tmp_path)
    for module in (csrc, limits, library_module):
        monkeypatch.setattr(module, "native", lambda: missing)


def test_providers_decline_without_the_library(without_library, monkeypatch):
    x = torch.randn(1, 512, 1152)
    assert ops.modulated_norm.choose(x, x[:, 0], x[:, 0]).name == "reference"
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "cpu")
    with pytest.raises(ops.OpError, match=r"cpu declines \(the native library was not built\)"):
        ops.modulated_norm(x, x[:, 0], x[:, 0])


def test_doctor_says_that_the_library_is_missing(without_library):
    report = doctor.examine()
    assert report["fused ops"]["native library"] == "the native library was not built"
    assert any("install stepgraph again" in line for line in report["advice"])
    assert report["fused ops"]["modulated_norm"].startswith("cpu float32: reference; cpu bfloat16: reference")


def test_doctor_says_who_runs_each_operation(monkeypatch):
    found = doctor.examine()["fused ops"]
    assert set(ops.OPS) < set(found)
    if native().library and native().level != "baseline":
        assert found["native library"].startswith(native().level)
        assert found["modulated_norm"].startswith("cpu float32: cpu; cpu bfloat16: cpu")
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "reference")
    assert doctor.examine()["fused ops"]["lowrank_delta"].startswith("cpu float32: reference; cpu bfloat16: reference")
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "triton")
    assert "no provider takes lowrank_delta" in doctor.examine()["fused ops"]["lowrank_delta"]
