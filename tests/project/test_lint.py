"""The direction of imports: ruff refuses what points the wrong way, and the lists of bans name every file there is."""

import subprocess
import sys

import pytest

from helpers.paths import ROOT

FORBIDDEN = [
    # The vocabulary imports nothing of the package's other parts.
    ("core/plan.py", "from stepgraph.compiler.tracing.trace import trace"),
    ("core/ops.py", "import stepgraph.triton_kernels"),
    ("core/ops.py", "import stepgraph.csrc"),
    ("core/liveness.py", "from stepgraph.runtime.memory.slots import assign_slots"),
    ("core/config.py", "from stepgraph.bench import record"),
    ("core/env.py", "from stepgraph.cli.main import main"),
    ("core/files.py", "from stepgraph import runtime"),
    # Kernels see the vocabulary.
    ("triton_kernels/new_kernel.py", "from stepgraph.compiler.tracing.trace import trace"),
    ("triton_kernels/new_kernel.py", "from stepgraph.runtime.memory.slots import assign_slots"),
    ("triton_kernels/new_kernel.py", "import stepgraph.csrc"),
    ("csrc/loader.py", "import stepgraph.triton_kernels"),
    ("csrc/loader.py", "import stepgraph.runtime"),
    ("csrc/loader.py", "from stepgraph.bench import record"),
    # The runtime runs without the compiler, and chooses no kernel by name.
    ("runtime/executable.py", "from stepgraph.compiler.tracing.trace import trace"),
    ("runtime/executable.py", "import stepgraph.triton_kernels.adaln"),
    ("runtime/executable.py", "from stepgraph.csrc import loader"),
    ("runtime/executable.py", "from stepgraph.cli.main import main"),
    ("runtime/executable.py", "from stepgraph.cli.demo import run"),
    ("runtime/executable.py", "import stepgraph.bench"),
    # So does the compiler.
    ("compiler/pipeline.py", "import stepgraph.triton_kernels"),
    ("compiler/pipeline.py", "from stepgraph import csrc"),
    ("compiler/pipeline.py", "from stepgraph.cli.main import main"),
    ("compiler/pipeline.py", "from stepgraph.cli.demo import run"),
    ("compiler/pipeline.py", "from stepgraph.bench import record"),
    # Passes, policies and adapters stand alone, and the compiler's own bans hold for them.
    ("compiler/passes/reuse_site.py", "from stepgraph.compiler.passes.store_site import store_site"),
    ("compiler/passes/new_pass.py", "from stepgraph.compiler.passes import reuse_site"),
    ("compiler/passes/reuse_site.py", "import stepgraph.triton_kernels"),
    ("compiler/passes/reuse_site.py", "from stepgraph.compiler.specializing.specialize import PASSES"),
    ("compiler/policies/full.py", "from stepgraph.compiler.policies.interval import interval"),
    ("compiler/policies/full.py", "from stepgraph.compiler.tracing.trace import trace"),
    ("compiler/policies/full.py", "import stepgraph.bench"),
    ("compiler/importers/l2c_router.py", "from stepgraph.compiler.importers.invardiff_book import export"),
    ("compiler/importers/l2c_router.py", "from stepgraph.compiler.tracing.trace import trace"),
    ("compiler/models/dit.py", "from stepgraph.compiler.tracing.trace import trace"),
    ("compiler/models/dit.py", "from stepgraph.runtime.memory.slots import assign_slots"),
    ("compiler/models/new_family.py", "from stepgraph.compiler.models.dit import DIT"),
    ("compiler/models/dit.py", "from stepgraph.cli.main import main"),
]

ALLOWED = [
    ("core/plan.py", "from stepgraph.files.whole_file import whole_file"),
    ("core/__init__.py", "from stepgraph.compiler.tracing.trace import trace"),
    ("core/cli.py", "from stepgraph.runtime.sampling.sample import sample"),
    ("core/demo.py", "from stepgraph.compiler.tracing.trace import trace"),
    ("triton_kernels/new_kernel.py", "from stepgraph.ops import register"),
    ("csrc/loader.py", "from stepgraph.env import read_env"),
    ("runtime/executable.py", "from stepgraph.plan import CachePlan"),
    ("compiler/pipeline.py", "from stepgraph.runtime.memory.slots import assign_slots"),
    ("compiler/passes/reuse_site.py", "from stepgraph.compiler.interfaces.pass_context import PassContext"),
    ("compiler/policies/full.py", "from stepgraph.compiler.interfaces.policy import Policy"),
    ("compiler/policies/__init__.py", "from stepgraph.compiler.policies.full import FULL"),
    ("compiler/models/dit.py", "from stepgraph.compiler.interfaces.family import Family"),
    ("compiler/models/__init__.py", "from stepgraph.compiler.models.dit import DIT"),
    ("bench/record.py", "from stepgraph.cli.main import main"),
    ("tests/test_new.py", "import stepgraph.triton_kernels"),
]


def findings(path: str, line: str, rule: str, *options: str) -> str:
    """What ruff says about a module of one import that lies at `path`."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--output-format=concise",
        f"--select={rule}",
        *options,
    ]
    command += ["--stdin-filename", path, "-"]
    result = subprocess.run(command, input=f"{line}\n", capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode in (0, 1), result.stderr
    return result.stdout


@pytest.mark.parametrize(("path", "line"), FORBIDDEN)
def test_refuses_import(path: str, line: str):
    found = findings(path, line, "TID251")
    assert "TID251" in found
    # The message says what to do instead, not only that it is banned.
    assert len(found.splitlines()[0].split("is banned: ")[1]) > 20


@pytest.mark.parametrize(("path", "line"), ALLOWED)
def test_allows_import(path: str, line: str):
    assert "TID251" not in findings(path, line, "TID251")


def test_refuses_import_inside_a_function():
    assert "TID251" in findings(
        "runtime/attach.py", "def f():\n    from stepgraph.compiler.tracing.trace import trace", "TID251"
    )


@pytest.mark.parametrize("path", ["core/plan.py", "compiler/passes/reuse_site.py", "runtime/slots.py", "bench/record.py"])
def test_refuses_relative_import(path: str):
    assert "TID252" in findings(path, "from .sibling import name", "TID252")


@pytest.mark.parametrize("path", ["core/__init__.py", "core/cli.py", "core/demo.py"])
@pytest.mark.parametrize("target", ["bench.record", "triton_kernels", "csrc"])
def test_face_imports_neither_bench_nor_kernels(path: str, target: str):
    face = ("--config", "core/face.ruff.toml")
    assert "TID251" in findings(path, f"import stepgraph.{target}", "TID251", *face)
    assert "TID251" not in findings(path, "from stepgraph.compiler.tracing.trace import trace", "TID251", *face)


def test_make_lint_checks_every_face_file():
    toml = pytest.importorskip("tomllib")
    exempt = toml.loads((ROOT / "core/ruff.toml").read_text())["lint"]["per-file-ignores"]
    recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "core/face.ruff.toml" in line)
    assert [name for name in exempt if f"core/{name}" not in recipe] == []


def _modules(folder: str, *apart: str) -> set[str]:
    package = "stepgraph." + folder.replace("/", ".")
    files = {path.stem for path in (ROOT / folder).glob("*.py")} | {path.parent.name for path in (ROOT / folder).glob("*/*.py")}
    return {f"{package}.{name}" for name in files - {"__init__", *apart}}


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("compiler/passes", _modules("compiler/passes", "context")),
        ("compiler/policies", _modules("compiler/policies", "policy")),
        ("compiler/importers", _modules("compiler/importers", "importer")),
        ("compiler/models", _modules("compiler/models", "family", "load") | _modules("compiler", "models")),
    ],
)
def test_bans_name_every_module(folder: str, expected: set[str]):
    toml = pytest.importorskip("tomllib")
    bans = toml.loads((ROOT / folder / "ruff.toml").read_text())["lint"]["flake8-tidy-imports"]["extend-banned-api"]
    assert sorted(expected - set(bans)) == [], f"add these to {folder}/ruff.toml, as its other lines do"
    gone = {name for name in bans if name.startswith(f"stepgraph.{folder.replace('/', '.')}.")} - expected
    assert sorted(gone) == [], f"{folder}/ruff.toml bans modules that do not exist"
