"""Artifacts: every process computes the same bits, and no damage is taken for what was saved."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import stepgraph as sg
from helpers.artifacts import rewrite
from helpers.children import environment
from helpers.tiny import inputs, noise, tiny_dit
from stepgraph.bench.deploy import fuzz_artifacts
from stepgraph.bench.deploy.fuzz_artifacts import fuzz

# -- determinism -----------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16)
SAMPLE = """
import os, sys, torch
from safetensors.torch import save_file
from helpers.tiny import tiny_scheduler, noise, labels
import stepgraph as sg
torch.set_num_threads(1)
found = {}
for given in sys.argv[2:]:
    os.environ["STEPGRAPH_CACHE"], path = given.split("=")
    executable = sg.load(path)
    dtype = next(executable.model.parameters()).dtype
    name = f"{dtype} {executable.config.backend}"
    found[name] = sg.sample(executable, tiny_scheduler("ddim"), noise(2).to(dtype), **labels(1, 2))
save_file(found, sys.argv[1])
"""


@pytest.mark.slow
def test_processes_compute_the_same_bits(ddim, tmp_path: Path):
    """Compiled by two processes that keep their regions in one place at once, or elsewhere, and taken from the one place."""
    artifacts = []
    for dtype in DTYPES:
        model = tiny_dit(num_layers=1).to(dtype)
        # Compiled, a step that computes all is one region.
        for backend, policy in (("eager", {"policy": "interval", "every": 2}), ("inductor", {"policy": "full"})):
            plan = sg.make_plan(**policy, model=model, scheduler=ddim, steps=2)
            executable = sg.compile(model, plan, inputs(2) | {"hidden_states": noise(2).to(dtype)}, "eager")
            artifacts.append(tmp_path / f"artifact-{len(artifacts)}")
            executable.save(artifacts[-1], with_weights=True)
            options = json.loads((artifacts[-1] / "manifest.json").read_text())["options"]
            rewrite(artifacts[-1], options=options | {"backend": backend})

    def start(name: str, *caches: str) -> tuple[subprocess.Popen, Path]:
        around = environment()
        around.pop("STEPGRAPH_REGIONS", None)
        places = [f"{tmp_path / cache}={path}" for cache, path in zip(caches, artifacts, strict=True)]
        command = [sys.executable, "-c", SAMPLE, str(tmp_path / name), *places]
        return subprocess.Popen(command, env=around), tmp_path / name

    # One dtype meets in one place, the other is compiled twice.
    running = [start("first", *["kept"] * 4), start("beside", "kept", "kept", "other", "other")]
    assert [process.wait(timeout=300) for process, _ in running] == [0, 0]
    kept = {path: path.read_bytes() for path in (tmp_path / "kept" / "regions").glob("*")}
    running.append(start("again", *["kept"] * 4))
    assert running[-1][0].wait(timeout=300) == 0
    assert kept
    assert list((tmp_path / "other" / "regions").glob("*"))
    assert {path: path.read_bytes() for path in (tmp_path / "kept" / "regions").glob("*")} == kept
    first, *others = (load_file(path) for _, path in running)
    assert set(first) == {f"{dtype} {backend}" for dtype in DTYPES for backend in ("eager", "inductor")}
    assert all(name.startswith(f"{tensor.dtype} ") for name, tensor in first.items())
    assert [len(other) for other in others] == [4, 4]
    for other in others:
        assert all(torch.equal(tensor, first[name]) for name, tensor in other.items())


# -- fuzzing ---------------------------------------------------------------------------------------------------------------


def test_damaged_artifacts_are_refused_or_equal():
    found = fuzz(150, seed=1)
    assert found["crashes"] == []
    assert found["files_written_elsewhere"] == 0
    assert sum(found["outcomes"].values()) == 150
    assert found["outcomes"]["wrong hash: refused"] > 15
    assert found["outcomes"]["right hash: refused"] > 20
    assert found["outcomes"]["right digest: refused"] > 10
    assert found["outcomes"]["zip: refused"] > 15


@pytest.mark.parametrize("check", ["refuse_model", "Factors.parse"])
def test_the_fuzzer_notices_what_a_missing_check_lets_through(monkeypatch, check: str):
    """Other weights or factors behind right hashes, accepted."""
    if check == "refuse_model":
        monkeypatch.setattr(fuzz_artifacts, "refuse_model", lambda *_: None)
        # The factors' own check would notice the other weights.
        monkeypatch.setattr(fuzz_artifacts, "compile_artifact", lambda *_: None)
    else:
        monkeypatch.setattr(fuzz_artifacts.Factors, "parse", lambda data, *_: SimpleNamespace(digest=hash(data)))
    crashes = fuzz(150, seed=1)["crashes"]
    assert crashes
    assert {entry["file"] for entry in crashes} <= {"weights.safetensors", "factors.safetensors", "plan.json", "manifest.json"}
