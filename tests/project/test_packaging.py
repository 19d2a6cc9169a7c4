"""What users install: the wheel holds everything, and it and the editable install import from any folder."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.wheels import shared_wheel

FOLDERS = {
    "core": "",
    "compiler": "compiler",
    "runtime": "runtime",
    "triton_kernels": "triton_kernels",
    "csrc": "csrc",
    "bench": "bench",
}


def packages() -> dict[str, Path]:
    """Package name -> folder, for every folder that holds Python files."""
    found = {}
    for folder, name in FOLDERS.items():
        inside = {path.parent for path in (ROOT / folder).rglob("*.py")}
        for path in inside:
            parts = ("stepgraph", *filter(None, [name]), *path.relative_to(ROOT / folder).parts)
            found[".".join(parts)] = path
    return found


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_wheel(tmp_path_factory)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel.

    It sees this environment's packages through a plain path, which leaves out the .pth files there and with them the
    editable install.
    """
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "-q", "--ignore-installed")
    run(environment / "bin" / "python", "-m", "pip", "install", *options, wheel, cwd=environment)
    return environment / "bin"


def test_every_package_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    mapped = dict(re.findall(r'^"(stepgraph[\w.]*)" = "([\w/]+)"$', text, re.MULTILINE))
    # What lies inside a mapped folder follows it.
    assert mapped == {("stepgraph." + name).rstrip("."): folder for folder, name in FOLDERS.items()}
    listed = re.findall(r'"([\w.]+)"', text.split("packages = [", 1)[1].split("]", 1)[0])
    assert sorted(listed) == sorted(packages()), "tool.setuptools.packages does not list the folders with Python files"


@pytest.mark.slow
def test_wheel_holds_every_file(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"stepgraph/py.typed"}
    for package, folder in packages().items():
        place = package.replace(".", "/")
        expected |= {f"{place}/{path.name}" for path in folder.glob("*.py")}
    expected |= {f"stepgraph/csrc/{path.name}" for kind in ("cpp", "h") for path in (ROOT / "csrc").glob(f"*.{kind}")}
    expected |= {f"stepgraph/bench/{path.name}" for path in (ROOT / "bench").glob("*.sh")}
    assets = [
        path
        for path in (ROOT / "core" / "assets").rglob("*")
        if path.is_file() and path.name != "ruff.toml" and not {"__pycache__", ".ruff_cache"} & set(path.parts)
    ]
    expected |= {f"stepgraph/{path.relative_to(ROOT / 'core').as_posix()}" for path in assets}
    assert sorted(expected - names) == []


@pytest.mark.slow
def test_wheel_holds_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted({name.split("/")[0].split("-")[0] for name in names}) == ["stepgraph"]
    assert [name for name in names if name.endswith(("ruff.toml", ".pyc", ".pt"))] == []


@pytest.mark.slow
def test_wheel_names_its_licence(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())


@pytest.mark.slow
def test_wheel_imports_from_anywhere(installed: Path, tmp_path: Path):
    modules = ", ".join(sorted(packages()))
    where = run(installed / "python", "-c", f"import {modules}; print(stepgraph.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(installed.parent)


@pytest.mark.slow
def test_wheel_has_the_command(installed: Path, tmp_path: Path):
    shown = run(installed / "stepgraph", "--help", cwd=tmp_path)
    for command in ("demo", "plan", "compile", "doctor"):
        assert command in shown


def test_editable_install_imports_from_anywhere(tmp_path: Path):
    where = run(sys.executable, "-c", "import stepgraph.compiler.passes; print(stepgraph.__file__)", cwd=tmp_path)
    assert Path(where) == ROOT / "core" / "__init__.py"
