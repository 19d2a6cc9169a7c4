"""Artifacts: what is loaded computes what was saved; what is damaged, forged or foreign is refused by name."""

import dataclasses
import hashlib
import json
import os
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import stepgraph as sg
from helpers.artifacts import rewrite
from helpers.tiny import inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.cli.main import app
from stepgraph.compiler.entry.load_artifact import build_model, build_scheduler
from stepgraph.errors import ArgumentError, CompileError, MismatchError, PlanError
from stepgraph.runtime.artifact.read_artifact import read_artifact

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


OPTIONS = {
    "backend": "eager", "exact": True, "hoist": False, "hoist_limit_mb": 64, "regions": False, "prepack": False, "merge": False,
    "slot_dtype": "bfloat16", "offload": True, "cuda_graphs": False, "max_autotune": True, "strict": True,
    "respecialize": False,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_kept(dit, ddim, tmp_path: Path, name: str):
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=4, every=2)
    config = sg.CompileConfig(**{"backend": "eager", name: OPTIONS[name]})
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(config)}
    saved = sg.compile(dit, plan, inputs(2), "eager")
    dataclasses.replace(saved, config=config).save(tmp_path / "artifact.zip")
    assert read_artifact(tmp_path / "artifact.zip").options == config


def test_weights_that_share_memory_share_it_again(ddim, tmp_path: Path):
    """Tied by hand: the class makes two."""
    model = tiny_dit()
    first, second = (model.transformer_blocks[i].ff.net[2] for i in range(2))
    second.weight = first.weight
    plan = sg.make_plan("interval", model=model, scheduler=ddim, steps=6, every=2)
    saved = sg.compile(model, plan, inputs(2), "eager")
    saved.save(tmp_path / "artifact", with_weights=True)
    loaded = sg.load(tmp_path / "artifact")
    first, second = (loaded.model.transformer_blocks[i].ff.net[2] for i in range(2))
    assert first.weight is second.weight
    assert torch.equal(images(loaded), images(saved))
    about = json.loads((tmp_path / "artifact" / "manifest.json").read_text())["model"]
    for tied in ({"pos_embed.proj.weight": "proj_out_1.weight"}, {"nothing": "proj_out_1.weight"}):
        rewrite(tmp_path / "artifact", model=about | {"tied": tied})
        with pytest.raises(PlanError, match=r"is said to be the same weight as 'proj_out_1\.weight'; the model has no such"):
            sg.load(tmp_path / "artifact")


def test_weights_written_to_since_are_saved_only_if_the_plan_follows_them(ddim, tmp_path: Path):
    model = tiny_dit()
    plan = sg.make_plan("interval", model=model, scheduler=ddim, steps=4, every=2)
    saved = sg.compile(model, plan, inputs(2), "eager")
    strict = sg.compile(model, plan.with_header(measured="choice"), inputs(2), "eager", strict=True)
    model.proj_out_2.weight.data.mul_(2)
    with pytest.raises(PlanError, match=r"proj_out_2\.weight hold other values than when the plan was compiled"):
        strict.save(tmp_path / "artifact", with_weights=True)
    assert list(tmp_path.iterdir()) == []
    saved.save(tmp_path / "artifact", with_weights=True)
    loaded = sg.load(tmp_path / "artifact")
    assert torch.equal(loaded.model.proj_out_2.weight, model.proj_out_2.weight)


def test_places_are_made_and_keep_the_users_mask(made, tmp_path: Path):
    made.save(tmp_path / "new" / "deep" / "dit.ZIP")
    assert zipfile.is_zipfile(tmp_path / "new" / "deep" / "dit.ZIP")
    before = os.umask(0o077)
    try:
        made.save(tmp_path / "mine")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(made, dit, tmp_path: Path, monkeypatch):
    made.save(tmp_path / "artifact")
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("no room")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no room"):
        made.save(tmp_path / "artifact")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    assert torch.equal(images(sg.load(tmp_path / "artifact", dit)), images(made))


def test_a_model_stays_where_it_is(made, dit, tmp_path: Path, monkeypatch):
    made.save(tmp_path / "artifact")
    with pytest.raises(ArgumentError, match="device is 'cuda:9', and no such device holds values here; expected cpu"):
        sg.load(tmp_path / "artifact", dit, device="cuda:9")
    # As if there were a card.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CompileError, match="the model is on cpu, but device is cuda; move the model, or leave device out"):
        sg.load(tmp_path / "artifact", dit, device="cuda")


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


# -- the command line ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
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
