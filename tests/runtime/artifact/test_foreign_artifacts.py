"""Artifacts of other models, versions and schedulers, and those that are damaged or forged, are refused by name."""

import json
import os
import stat
import zipfile
from pathlib import Path

import pytest
import torch

import stepgraph as sg
from helpers.artifacts import compiled_with_factors, images, rehash, rewrite
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.compiler.entry.load_artifact import build_model, build_scheduler
from stepgraph.errors import CompileError, MismatchError, PlanError
from stepgraph.runtime.artifact.read_artifact import read_artifact


@pytest.fixture(scope="module")
def made(dit):
    return compiled_with_factors(dit)


def test_other_weights_are_followed_or_refused(made, tmp_path: Path):
    made.save(tmp_path / "artifact")
    with pytest.raises(MismatchError, match=r"the plan is for other weights of DiT.* numbers that were measured"):
        sg.load(tmp_path / "artifact", tiny_dit(seed=1))
    plan, other = sg.make_plan("full", model=made.model, scheduler=tiny_scheduler("ddim"), steps=2), tiny_dit(seed=1)
    sg.compile(made.model, plan, inputs(2), "eager").save(tmp_path / "full")
    assert sg.load(tmp_path / "full", other).model is other
    chosen = sg.compile(made.model, plan.with_header(measured="choice"), inputs(2), "eager", strict=True)
    chosen.save(tmp_path / "strict")
    with pytest.raises(MismatchError, match="strict=True refuses others"):
        sg.load(tmp_path / "strict", other)
    with pytest.raises(PlanError, match="has no weights; pass the model it was made for"):
        sg.load(tmp_path / "artifact")
    with pytest.raises(PlanError, match="the artifact is of a float32 model; this one is bfloat16"):
        sg.load(tmp_path / "artifact", tiny_dit().to(torch.bfloat16))


def test_a_scheduler_that_is_not_the_plans_is_not_saved(made, tmp_path: Path):
    with pytest.raises(PlanError, match="compiled for DDIMScheduler, but the scheduler to save has EulerDiscreteScheduler"):
        made.save(tmp_path / "artifact", scheduler=tiny_scheduler("euler"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["torch", "diffusers", "stepgraph"])
def test_another_version_is_warned_of_and_verified(made, dit, tmp_path: Path, monkeypatch, package: str):
    made.save(tmp_path / "artifact")
    versions = json.loads((tmp_path / "artifact" / "manifest.json").read_text())["versions"]
    rewrite(tmp_path / "artifact", versions=versions | {package: "0.0.1\x1b[2J"})
    said = rf"made with {package} '0\.0\.1\\x1b\[2J' \(here .*"
    with pytest.warns(UserWarning, match=f"{said}first step is compared"):
        loaded = sg.load(tmp_path / "artifact", dit)
    assert torch.equal(images(loaded), images(made))
    session = type(made).session
    monkeypatch.setattr(type(made), "session", lambda self: lambda **given: (session(self)(**given)[0] * 1.01,))
    with (
        pytest.warns(UserWarning, match=f"{said}first step is compared"),
        pytest.raises(CompileError, match=r"the first step differs from DiT.* by 0\.01 \(relative L2"),
    ):
        sg.load(tmp_path / "artifact", dit)
    with pytest.warns(UserWarning, match=f"{said}nothing is compared"):
        sg.load(tmp_path / "artifact", dit, verify=False)
    rewrite(tmp_path / "artifact", versions=versions)
    sg.load(tmp_path / "artifact", dit)
    with pytest.raises(CompileError, match="the first step differs"):
        sg.load(tmp_path / "artifact", dit, verify=True)


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
        ({"files": {"notes.txt": {"bytes": 700_000_000, "sha256": ""}}}, r"lists notes\.txt, which is no part of an artifact"),
        ({"files": {"graph-000-step-000.txt": {"bytes": 2**27, "sha256": ""}}}, "a plan or graph has at most 67108864"),
        (
            {"files": {f"graph-{i:03d}-step-000.txt": {"bytes": 2**26, "sha256": ""} for i in range(17)}},
            "has at most 1073741824",
        ),
        ({"guidance": "separate"}, "guidance and branches are"),
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


@pytest.mark.parametrize("value", ["1e999", "[" * 992 + "]" * 992, "9" * 5000])
def test_strange_values_in_a_manifest_are_refused(folder: Path, value: str):
    text = (folder / "manifest.json").read_text()
    assert '"guidance": "batched"' in text
    (folder / "manifest.json").write_text(text.replace('"guidance": "batched"', f'"guidance": {value}'))
    with pytest.raises(PlanError, match=r"manifest\.json: "):
        read_artifact(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"evil": {"value": 1}},
        {"class_labels": {"shape": [2], "dtype": "float32"}},
        {"cross_attention_kwargs": {"value": "text"}},
        {"class_labels": {"entries": {"a": {"shape": [2], "dtype": "int64"}}}},
    ],
)
def test_inputs_that_the_model_does_not_take_are_refused(folder: Path, dit, changes: dict):
    given = json.loads((folder / "manifest.json").read_text())["inputs"]
    rewrite(folder, inputs=given | changes)
    with pytest.raises(PlanError, match=f"{folder.name}: "):
        sg.load(folder, dit)


def test_packed_tensors_are_refused(folder: Path, tmp_path: Path):
    """Stored as they are, none can be larger than the file it is in."""
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    with pytest.raises(PlanError, match=r"safetensors is packed; tensors are stored as they are"):
        read_artifact(tmp_path / "packed.zip")


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
        with zipfile.ZipFile(archive, "w") as made:
            for file in folder.iterdir():
                made.write(file, file.name, zipfile.ZIP_STORED if file.suffix == ".safetensors" else zipfile.ZIP_DEFLATED)
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
