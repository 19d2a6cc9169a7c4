"""Artifacts: what is loaded computes what was saved; what is damaged, forged or foreign is refused by name."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import inputs, labels, noise, tiny_dit, tiny_scheduler
from safetensors.torch import load_file
from typer.testing import CliRunner

import stepgraph as sg
from stepgraph.bench.fuzz_artifacts import fuzz
from stepgraph.cli import app
from stepgraph.compiler.load_artifact import build_model, build_scheduler
from stepgraph.config import CompileError
from stepgraph.plan import PlanError
from stepgraph.runtime.artifact import manifest_bytes, read_artifact

FORMS = ("artifact", "artifact.zip")


@pytest.fixture(scope="module")
def made(dit):
    """A plan with REUSE, FORECAST and LOWRANK rows, compiled with its factors."""
    ddim = tiny_scheduler("ddim")
    actions = {"ff": "CCRRCC", "attn": "CCRCRC", "hidden": "CCCCCR"}
    plan = sg.make_plan("manual", model=dit, scheduler=ddim, steps=6, actions=actions)
    factors = sg.factorize(dit, method="svd", rank=4)
    plan = sg.lowrank(sg.forecast(plan, "taylor", order=1, kinds=["attn"]), kinds=["ff"])
    return sg.compile(dit, plan, inputs(2), "eager", factors=factors)


def images(executable: sg.Executable) -> torch.Tensor:
    return sg.sample(executable, tiny_scheduler("ddim"), noise(2), **labels(1, 2))


def rewrite(path: Path, **changes) -> None:
    """Forge a manifest: its digest is right again."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_bytes(manifest_bytes(manifest | changes))


def rehash(path: Path, name: str) -> None:
    """Forge a file: the manifest states its hash."""
    data = (path / name).read_bytes()
    files = json.loads((path / "manifest.json").read_text())["files"]
    rewrite(path, files=files | {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}})


@pytest.mark.parametrize("form", FORMS)
def test_what_is_loaded_computes_what_was_saved(made, dit, tmp_path: Path, form: str):
    made.save(tmp_path / form)
    loaded = sg.load(tmp_path / form, dit)
    assert {action for row in loaded.plan.rows for action in row} == set("CFLR.")
    assert loaded.plan == made.plan
    assert loaded.config == made.config
    assert torch.equal(images(loaded), images(made))


@pytest.mark.parametrize("form", FORMS)
def test_with_weights_no_model_is_needed(made, dit, tmp_path: Path, form: str):
    made.save(tmp_path / form, with_weights=True, scheduler=tiny_scheduler("ddim"))
    loaded = sg.load(tmp_path / form)
    assert loaded.model is not dit
    assert torch.equal(images(loaded), images(made))
    scheduler = build_scheduler(read_artifact(tmp_path / form))
    assert torch.equal(sg.sample(loaded, scheduler, noise(2), **labels(1, 2)), images(made))


@pytest.mark.parametrize("form", FORMS)
def test_the_same_executable_makes_the_same_bytes_and_replaces_what_was_there(made, tmp_path: Path, form: str):
    digests = []
    for _ in range(2):
        made.save(tmp_path / form)
        files = [tmp_path / form] if form.endswith("zip") else sorted((tmp_path / form).iterdir())
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert digests[0] == digests[1]
    assert [path.name for path in tmp_path.iterdir()] == [form]


def test_an_artifact_holds_no_weights_no_tables_and_no_code(made, tmp_path: Path):
    made.save(tmp_path / "artifact")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "artifact").iterdir()}
    graphs = {name for name in sizes if name.startswith("graph-")}
    assert set(sizes) == {"manifest.json", "plan.json", "factors.safetensors", *graphs}
    assert len(graphs) == len(made.default.variants)
    tensors = sum(t.nbytes for pair in made.factors.maps.values() for t in pair)
    assert sizes["factors.safetensors"] < tensors + 4096


def test_a_graphs_text_is_not_run(made, dit, tmp_path: Path):
    made.save(tmp_path / "artifact")
    for graph in (tmp_path / "artifact").glob("graph-*.txt"):
        graph.write_text("raise SystemExit('run')")
        rehash(tmp_path / "artifact", graph.name)
    assert torch.equal(images(sg.load(tmp_path / "artifact", dit)), images(made))


def test_something_else_is_not_replaced(made, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(PlanError, match="is no artifact; choose another place"):
        made.save(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


# -- other models, versions, schedulers ------------------------------------------------------------------------------------


def test_other_weights_are_refused(made, tmp_path: Path):
    made.save(tmp_path / "artifact")
    with pytest.raises(PlanError, match="the artifact is of other weights of DiTTransformer2DModel"):
        sg.load(tmp_path / "artifact", tiny_dit(seed=1))
    with pytest.raises(PlanError, match="has no weights; pass the model it was made for"):
        sg.load(tmp_path / "artifact")
    with pytest.raises(PlanError, match="the artifact is of a float32 model; this one is bfloat16"):
        sg.load(tmp_path / "artifact", tiny_dit().to(torch.bfloat16))


def test_a_scheduler_that_is_not_the_plans_is_not_saved(made, tmp_path: Path):
    with pytest.raises(PlanError, match="compiled for DDIMScheduler, but the scheduler to save has EulerDiscreteScheduler"):
        made.save(tmp_path / "artifact", scheduler=tiny_scheduler("euler"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["torch", "diffusers", "stepgraph"])
def test_another_version_is_warned_of_and_verified(made, dit, tmp_path: Path, package: str):
    made.save(tmp_path / "artifact")
    versions = json.loads((tmp_path / "artifact" / "manifest.json").read_text())["versions"]
    rewrite(tmp_path / "artifact", versions=versions | {package: "0.0.1"})
    with pytest.warns(UserWarning, match=rf"made with {package} 0\.0\.1 \(here .*first step is compared"):
        loaded = sg.load(tmp_path / "artifact", dit)
    assert torch.equal(images(loaded), images(made))


def test_a_first_step_that_differs_is_refused(made, dit, tmp_path: Path, monkeypatch):
    made.save(tmp_path / "artifact")
    session = type(made).session
    monkeypatch.setattr(type(made), "session", lambda self: lambda **given: (session(self)(**given)[0] * 1.01,))
    with pytest.raises(CompileError, match=r"the first step differs from DiT.* by 0\.01 \(relative L2"):
        sg.load(tmp_path / "artifact", dit, verify=True)


# -- damage and forgery ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(made, tmp_path: Path) -> Path:
    made.save(tmp_path / "artifact", with_weights=True, scheduler=tiny_scheduler("ddim"))
    return tmp_path / "artifact"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "format version 2; this release reads version 1"),
        ({"version": True}, "format version True"),
        ({"options": {"backend": "nvcc"}}, "options: backend is 'nvcc'"),
        ({"options": {"exact": "yes"}}, "the option exact is 'yes', which is not of the type it has"),
        ({"options": {"shell": "rm"}}, "unknown option 'shell'"),
        ({"inputs": {"hidden_states": {"shape": [10**12, 4, 8, 8], "dtype": "float32"}}}, "a batch of at most 65536"),
        ({"inputs": {"hidden_states": {"shape": [2, 4, 8, 9], "dtype": "float32"}}}, r"the plan's shape \(4, 8, 8\)"),
        ({"inputs": {"hidden_states": {"shape": [2, 4, 8, 8], "dtype": "complex64"}}}, "one of the dtypes"),
        ({"files": {"../../evil": {"bytes": 1, "sha256": ""}}}, "files is not an object of plain file names"),
        ({"files": {}}, r"lists no plan\.json"),
        ({"versions": {"torch": "1"}}, "expected texts for stepgraph, torch, diffusers, python"),
        ({"scheduler": {"class": "EulerDiscreteScheduler", "hash": "0"}}, "expected the plan's DDIMScheduler"),
    ],
)
def test_a_forged_manifest_is_refused(folder: Path, changes: dict, said: str):
    rewrite(folder, **changes)
    with pytest.raises(PlanError, match=said):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class": "system"}, "the artifact is of a float32 system, its plan of a float32 DiTTransformer2DModel"),
        ({"config": {"num_layers": 10**9}}, "has num_layers 1000000000, more than its"),
        ({"config": {"sample_size": 10**5}}, "has sample_size 100000, more than its"),
        ({"config": {"surprise": 1}}, "no DiTTransformer2DModel can be made of its configuration"),
        ({"config": {"num_layers": 1}}, "the weights have more than the model"),
    ],
)
def test_a_forged_model_is_refused(folder: Path, changes: dict, said: str):
    model = json.loads((folder / "manifest.json").read_text())["model"]
    rewrite(folder, model=model | changes | ({"config": model["config"] | changes["config"]} if "config" in changes else {}))
    with pytest.raises(PlanError, match=said):
        build_model(read_artifact(folder))


def test_a_scheduler_class_outside_the_list_is_refused(folder: Path):
    artifact = read_artifact(folder)
    object.__setattr__(artifact, "scheduler", {"class": "DiffusionPipeline", "hash": "", "config": {}})
    with pytest.raises(PlanError, match="the scheduler 'DiffusionPipeline' is not rebuilt from artifacts"):
        build_scheduler(artifact)
    object.__setattr__(artifact, "scheduler", {"class": "DDIMScheduler", "hash": "", "config": {"num_train_timesteps": 10**12}})
    with pytest.raises(PlanError, match="num_train_timesteps 1000000000000; at most 100000"):
        build_scheduler(artifact)


def test_factors_of_another_run_are_refused(folder: Path, dit):
    sg.factorize(dit, method="svd", rank=2).save(folder / "factors.safetensors")
    with pytest.raises(PlanError, match=r"factors\.safetensors is not the file that was saved"):
        sg.load(folder, dit)
    rehash(folder, "factors.safetensors")
    with pytest.raises(PlanError, match="the plan is bound to the factors"):
        sg.load(folder, dit)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, '{"format": ' + "1" * 10_000 + "}", "", "null", "{}"])
def test_strange_json_is_refused(folder: Path, text: str):
    for name in ("manifest.json", "plan.json"):
        (folder / name).write_text(text)
        if name == "plan.json":
            continue
        with pytest.raises(PlanError, match=r"manifest\.json: not a"):
            read_artifact(folder)


def test_a_deep_plan_is_refused(folder: Path):
    (folder / "plan.json").write_text('{"a":' * 200_000)
    rehash(folder, "plan.json")
    with pytest.raises(PlanError, match="not a complete JSON document"):
        read_artifact(folder)


def test_links_pipes_and_folders_are_refused(folder: Path):
    plan = folder / "plan.json"
    plan.rename(folder.parent / "elsewhere.json")
    plan.symlink_to(folder.parent / "elsewhere.json")
    with pytest.raises(PlanError, match=r"plan\.json is a symbolic link"):
        read_artifact(folder)
    plan.unlink()
    os.mkfifo(plan)
    with pytest.raises(PlanError, match=r"plan\.json is not a regular file"):
        read_artifact(folder)
    plan.unlink()
    with pytest.raises(PlanError, match=r"the file plan\.json is missing"):
        read_artifact(folder)
    plan.mkdir()
    with pytest.raises(PlanError, match=r"plan\.json cannot be read"):
        read_artifact(folder)


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/tmp/evil.txt", "a/b.txt", "..", "evil\\..\\x", "new.txt\0.json", ".hidden", "d/"]
)
def test_zip_slip_names_are_refused(folder: Path, tmp_path: Path, name: str):
    before = sorted(tmp_path.rglob("*"))
    archive = tmp_path / "artifact.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for file in folder.iterdir():
            made.write(file, file.name)
        entry = zipfile.ZipInfo("x")
        entry.filename = name
        made.writestr(entry, b"evil")
    with pytest.raises(PlanError, match="artifacts have no folders or paths"):
        read_artifact(archive)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, archive])


def test_bombs_links_and_twice_the_same_name_are_refused(folder: Path, tmp_path: Path):
    archive = tmp_path / "artifact.zip"

    def zipped(*extra: tuple[zipfile.ZipInfo, bytes]) -> Path:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
            for file in folder.iterdir():
                made.write(file, file.name)
            for entry, data in extra:
                made.writestr(entry, data)
        return archive

    read_artifact(zipped())
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(PlanError, match=r"link\.txt is a symbolic link"):
        read_artifact(zipped((link, b"/etc/passwd")))
    with pytest.warns(UserWarning, match="Duplicate name"), pytest.raises(PlanError, match="is in the zip twice"):
        read_artifact(zipped((zipfile.ZipInfo("plan.json"), b"{}")))
    (folder / "manifest.json").write_bytes(b" " * (2**26 + 1))
    with pytest.raises(PlanError, match=r"manifest\.json has more than the 67108864 bytes"):
        read_artifact(zipped())


# -- the command line ------------------------------------------------------------------------------------------------------


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


# -- determinism -----------------------------------------------------------------------------------------------------------

SAMPLE = """
import sys, torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
from conftest import tiny_scheduler, noise, labels
import stepgraph as sg
torch.set_num_threads(1)
found = {}
for path in sys.argv[3:]:
    executable = sg.load(path)
    dtype = next(executable.model.parameters()).dtype
    found[str(dtype)] = sg.sample(executable, tiny_scheduler("ddim"), noise(2).to(dtype), **labels(1, 2))
save_file(found, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_processes_compute_the_same_bits(ddim, tmp_path: Path, backend: str):
    """Compiled anew, from regions that another process kept, and compiled anew beside that."""
    artifacts = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_dit().to(dtype)
        plan = sg.make_plan("interval", model=model, scheduler=ddim, steps=4, every=2)
        given = inputs(2) | {"hidden_states": noise(2).to(dtype)}
        artifacts.append(tmp_path / f"artifact-{len(artifacts)}")
        sg.compile(model, plan, given, "eager").save(artifacts[-1], with_weights=True)
        options = json.loads((artifacts[-1] / "manifest.json").read_text())["options"]
        rewrite(artifacts[-1], options=options | {"backend": backend})

    def start(name: str, cache: str) -> tuple[subprocess.Popen, Path]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "STEPGRAPH_CACHE": str(tmp_path / cache)}
        environment.pop("STEPGRAPH_REGIONS", None)
        command = [sys.executable, "-c", SAMPLE, str(Path(__file__).parent), str(tmp_path / name), *map(str, artifacts)]
        return subprocess.Popen(command, env=environment), tmp_path / name

    running = [start("first", "kept"), start("apart", "other")]
    assert [process.wait(timeout=300) for process, _ in running] == [0, 0]
    kept = list((tmp_path / "kept" / "regions").glob("*"))
    running.append(start("again", "kept"))
    assert running[-1][0].wait(timeout=300) == 0
    assert bool(kept) == (backend == "inductor")
    assert list((tmp_path / "kept" / "regions").glob("*")) == kept
    first, *others = (load_file(path) for _, path in running)
    assert {name: str(tensor.dtype) for name, tensor in first.items()} == {name: name for name in first}
    assert len(first) == 2
    for other in others:
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())


# -- fuzzing ---------------------------------------------------------------------------------------------------------------


def test_damaged_artifacts_are_refused_or_equal():
    found = fuzz(150, seed=1)
    assert found["crashes"] == []
    assert found["files_written_elsewhere"] == 0
    assert sum(found["outcomes"].values()) == 150
    assert found["outcomes"]["wrong hash: refused"] > 30
    assert found["outcomes"]["right hash: refused"] > 20
    assert found["outcomes"]["zip: refused"] > 30
