"""The import walls: a folder is a stage, and imports only from the floors below it."""

import ast
import subprocess

import pytest
from ruff.__main__ import find_ruff_bin

from helpers.paths import ROOT
from stepgraph.ops import OPS

# From the ground up. What stands in one row does not import each other; core/cli and core/__init__.py are the face.
FLOORS = (
    ("core",),
    ("core/assets",),
    ("core/files",),
    ("core/plan",),
    ("triton_kernels", "csrc"),
    ("runtime/memory",),
    ("runtime/program", "runtime/capture"),
    ("runtime/session",),
    ("runtime/sampling", "runtime/attach", "runtime/artifact"),
    ("runtime/export",),
    ("runtime",),
    ("compiler/interfaces",),
    ("compiler/models", "compiler/policies", "compiler/importers"),
    ("compiler/tracing",),
    ("compiler/marking",),
    ("compiler/passes", "compiler/passes/sites", "compiler/passes/fuse", "compiler/passes/program"),
    ("compiler/specializing", "compiler/lowering"),
    ("compiler",),
    ("compiler/calibration",),
    ("compiler/routers", "compiler/forecast", "compiler/lowrank"),
    ("compiler/planning",),
    ("compiler/entry",),
    ("core/cli", "bench"),
    ("bench/glyphs", "bench/emoji"),
    ("bench/ops", "bench/speed", "bench/deploy", "bench/quality"),
)
FLOOR_OF = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
SOURCES = ("core", "compiler", "runtime", "triton_kernels", "csrc", "bench")
# Files of one kind in these folders do not import each other.
PASSES = {"compiler/passes/sites", "compiler/passes/fuse", "compiler/passes/program"}
KINDS = {"compiler/policies", "compiler/importers", "compiler/models"}
ALONE = {*PASSES, *KINDS}
# Folders that may import less than all that lies below them: the vocabulary, and these.
VOCABULARY = frozenset({"core", "core/assets", "core/files", "core/plan"})
OF_PASSES = VOCABULARY | {"runtime/program", "compiler/interfaces", "compiler/tracing", "compiler/marking"}
NARROW = dict.fromkeys(KINDS, VOCABULARY | {"compiler/interfaces"}) | dict.fromkeys({"compiler/passes", *PASSES}, OF_PASSES)


def package(folder: str) -> str:
    """The dotted name of a folder; `core` is stepgraph itself."""
    return ("stepgraph." + folder.removeprefix("core").strip("/").replace("/", ".")).rstrip(".")


def example_of(folder: str) -> str:
    """A module that lies in a folder."""
    return {
        "core": "stepgraph.config",
        "runtime": "stepgraph.runtime.executable",
        "compiler": "stepgraph.compiler.pipeline",
    }.get(folder, f"{package(folder)}.some_file")


def modules() -> dict[str, str]:
    """Module name -> folder, of every source file."""
    found = {}
    for source in SOURCES:
        for path in (ROOT / source).rglob("*.py"):
            folder = path.parent.relative_to(ROOT).as_posix()
            stem = "" if path.stem == "__init__" else f".{path.stem}"
            found[package(folder) + stem] = folder
    return found


def imports(path) -> set[str]:
    """The stepgraph modules, or names of packages, that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stepgraph":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "stepgraph"}
    return names


def folder_of(name: str, known: dict[str, str]) -> str | None:
    """Where an imported name lies."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return known.get(name)


def is_of_the_face(name: str, known: dict[str, str]) -> bool:
    """Whether an imported name is the package itself, or one that it offers."""
    return name == "stepgraph" or (name.count(".") <= 1 and name not in known)


def test_every_folder_has_its_floor():
    assert set(modules().values()) == set(FLOOR_OF)


def test_a_folder_imports_from_floors_below_only():
    known, wrong = modules(), []
    for source in SOURCES:
        for path in (ROOT / source).rglob("*.py"):
            folder = path.parent.relative_to(ROOT).as_posix()
            if path == ROOT / "core" / "__init__.py":
                continue
            for name in imports(path):
                other = folder_of(name, known)
                # The face itself is no vocabulary: what it offers lies on floors of its own.
                face = is_of_the_face(name, known) and folder != "core/cli" and source != "bench"
                outside = other not in (None, folder) and other not in NARROW.get(folder, {other})
                if face or outside or (other not in (None, folder) and FLOOR_OF[other] >= FLOOR_OF[folder]):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("folder", ["triton_kernels", *sorted(ALONE)])
def test_files_of_one_kind_do_not_import_each_other(folder):
    """Of kernels, the files that are named after an operation; what they share lies in the others."""
    files = [path for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"]
    if folder == "triton_kernels":
        files = [path for path in files if path.stem in OPS]
        assert len(files) == len(OPS)
    names = {f"{package(folder)}.{path.stem}" for path in files}
    for path in files:
        assert not {name.rpartition(".")[0] for name in imports(path)} & names, path.name
        assert not imports(path) & names, path.name


def findings(path: str, line: str, rule: str, *options: str) -> str:
    """What ruff says about a module of one import that lies at `path`."""
    # The program itself: `python -m ruff` starts a Python first, which takes four times as long.
    command = [find_ruff_bin(), "check", "--no-cache", "--output-format=concise", f"--select={rule}", *options]
    command += ["--stdin-filename", path, "-"]
    result = subprocess.run(command, input=f"{line}\n", capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode in (0, 1), result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("folder", "file"),
    [*((folder, "new_file.py") for folder in sorted(FLOOR_OF)), *((kind, "__init__.py") for kind in sorted(KINDS))],
)
def test_ruff_refuses_imports_from_above(folder, file):
    """A new file in the folder, which no configuration knows, imports from every folder on a floor above, or beside it; the
    registries name their own files line by line.
    """
    above = [other for other, number in FLOOR_OF.items() if number > FLOOR_OF[folder]]
    beside = [other for other in FLOORS[FLOOR_OF[folder]] if other != folder]
    if folder.startswith("bench"):
        above = [other for other in above if other.startswith("bench")]
        beside = [other for other in beside if other.startswith("bench")]
    narrow = [other for other in FLOOR_OF if folder in NARROW and other not in (*NARROW[folder], *above, *beside, folder)]
    forbidden = [*above, *beside, *narrow, *([folder] if folder in ALONE else [])]
    text = "\n".join(f"import {example_of(other)}" for other in forbidden)
    lines = findings(f"{folder}/{file}", text, "TID251").splitlines()
    refused = {int(line.split(":")[1]) for line in lines if " TID251 " in line}
    assert [other for number, other in enumerate(forbidden, start=1) if number not in refused] == []
    # The message says what to do instead, not only that it is banned.
    assert all(len(line.split("is banned: ")[1]) > 20 for line in lines if " TID251 " in line)


@pytest.mark.parametrize("folder", sorted(FLOOR_OF))
def test_ruff_allows_imports_from_below(folder):
    below = [other for other, number in FLOOR_OF.items() if number < FLOOR_OF[folder]]
    below = [other for other in below if other not in ("triton_kernels", "csrc", "core/cli")]
    below = [other for other in below if other in NARROW.get(folder, {other})]
    text = "\n".join(f"import {example_of(other)}" for other in below)
    assert "TID251" not in findings(f"{folder}/new_file.py", text, "TID251")


def test_no_folder_leaves_files_out_of_its_wall():
    """But core/, whose `__init__.py` is the face."""
    lax = [path for path in ROOT.rglob("ruff.toml") if "per-file-ignores" in path.read_text() and ".venv" not in path.parts]
    assert lax == [ROOT / "core" / "ruff.toml"]


def test_ruff_refuses_imports_inside_a_function():
    assert "TID251" in findings(
        "runtime/attach/attach.py", "def f():\n    from stepgraph.compiler.tracing import trace", "TID251"
    )


@pytest.mark.parametrize(
    "path", ["core/plan/plan.py", "compiler/passes/sites/reuse_site.py", "runtime/memory/slots.py", "bench/record.py"]
)
def test_ruff_refuses_relative_imports(path: str):
    assert "TID252" in findings(path, "from .sibling import name", "TID252")


@pytest.mark.parametrize("folder", sorted(FLOOR_OF))
def test_ruff_refuses_names_of_the_face(folder: str):
    """They lie on floors of their own, mostly above."""
    path = f"{folder}/new_file.py"
    text = "from stepgraph import accelerate\nimport stepgraph\nimport stepgraph as sg\nimport stepgraph as face"
    lines = [line.split()[:2] for line in findings(path, text, "ICN").splitlines() if path in line]
    assert [(int(place.split(":")[1]), rule) for place, rule in lines] == [
        (1, "ICN003"), (2, "ICN001"), (3, "ICN002"), (4, "ICN001"),
    ]  # fmt: skip
    assert "ICN" not in findings(path, "from stepgraph.plan import CachePlan\nimport stepgraph.checks", "ICN")


def test_the_name_of_the_package_alone_is_the_face(tmp_path):
    path = tmp_path / "new.py"
    path.write_text("import stepgraph as sg\nfrom stepgraph import accelerate\nimport stepgraph.checks\n")
    assert imports(path) == {"stepgraph", "stepgraph.accelerate", "stepgraph.checks"}
    assert [name for name in sorted(imports(path)) if is_of_the_face(name, modules())] == ["stepgraph", "stepgraph.accelerate"]


@pytest.mark.parametrize(
    "path", ["core/new.py", "core/cli/new.py", "core/plan/new.py", "runtime/new.py", "compiler/models/new.py"]
)
@pytest.mark.parametrize("library", ["diffusers", "transformers", "peft"])
def test_no_module_imports_the_libraries_of_models_when_it_is_imported(path: str, library: str):
    assert "TID253" in findings(path, f"import {library}", "TID253")
    assert "TID253" in findings(path, f"from {library}.models import name", "TID253")
    assert "TID253" not in findings(path, f"def f():\n    import {library}", "TID253")


@pytest.mark.parametrize("path", ["core/__init__.py", "core/cli/main.py", "core/cli/new_command.py"])
@pytest.mark.parametrize("target", ["bench.record", "triton_kernels", "csrc"])
def test_the_face_imports_neither_bench_nor_kernels(path: str, target: str):
    face = ("--config", "core/cli/ruff.toml")
    assert "TID251" in findings(path, f"import stepgraph.{target}", "TID251", *face)
    assert "TID251" not in findings(path, "from stepgraph.compiler.tracing.trace import trace", "TID251", *face)


def test_make_lint_checks_the_face():
    recipe = (ROOT / "Makefile").read_text()
    assert "ruff check --config core/cli/ruff.toml core/__init__.py core/cli" in recipe


@pytest.mark.parametrize("path", ["tests/project/test_new.py", "bench/speed/new.py"])
def test_tests_and_benchmarks_see_everything(path):
    text = "import stepgraph.cli.main\nimport stepgraph.compiler.entry.accelerate\nimport stepgraph.triton_kernels"
    assert "TID251" not in findings(path, text, "TID251")


def modules_of_tests(node: ast.AST) -> list[str]:
    """The test modules, or conftest, that an import names, as a module or as a part of one."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return [name for name in names if any(part == "conftest" or part.startswith("test_") for part in name.split("."))]


@pytest.mark.parametrize(
    "line",
    [
        "import test_other",
        "import core.test_other as other",
        "from test_other import f",
        "from core import test_other",
        "import conftest",
    ],
)
def test_another_test_is_recognised(line: str):
    assert modules_of_tests(ast.parse(line).body[0])
    assert not modules_of_tests(ast.parse("from helpers.tiny import inputs").body[0])


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert modules_of_tests(node) == [], path.name
