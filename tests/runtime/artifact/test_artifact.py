"""Artifacts: what is loaded computes what was saved."""

import dataclasses
import hashlib
import json
import os
import stat
import zipfile
from pathlib import Path

import pytest
import torch

import stepgraph as sg
from helpers.artifacts import compiled_with_factors, images, rehash, rewrite
from helpers.tiny import inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.compiler.entry.load_artifact import build_scheduler
from stepgraph.errors import ArgumentError, CompileError, PlanError
from stepgraph.runtime.artifact.read_artifact import read_artifact

FORMS = ("artifact", "artifact.zip")


@pytest.fixture(scope="module")
def made(dit):
    return compiled_with_factors(dit)


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
