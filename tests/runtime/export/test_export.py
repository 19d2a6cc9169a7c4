"""Exports: equal to the executable in a process without stepgraph, weights once, folders whole or not at all."""

import json
import runpy
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stepgraph as sg
from helpers.distance import SAME_EXPORTED_RUN, error
from helpers.exports import mixed_plan, run_fresh
from helpers.oracle import Oracle, run_loop
from helpers.small_glyphs import small_glyph_dit
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.compiler.entry.load_model import load_scheduler
from stepgraph.runtime.export import pt2 as export_pt2
from stepgraph.runtime.export.runner import Runner, ScheduleError, read_tensors, write_tensors

STEPS = 6
# Without clipping, as DiT's own configuration has it: then every step is a fixed linear combination.
DDIM = diffusers.DDIMScheduler(clip_sample=False)
CLASSES = {"class_labels": torch.tensor([1, 2])}
NULL = {"class_labels": torch.tensor([NULL_CLASS, NULL_CLASS])}


def negative(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"negative_{name}": value for name, value in given.items()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Executable, plan, factors and export of the tiny DiT under a plan of all four actions."""
    model, scheduler = tiny_dit(), DDIM
    plan, factors = mixed_plan(model, scheduler, STEPS, 4)
    exe = sg.compile(model, plan, inputs(4), backend="eager", factors=factors)
    weights = dict(model.named_parameters())
    folder = exe.export(tmp_path_factory.mktemp("export") / "pt2", scheduler=scheduler)
    # The model's own parameters stood in for nothing meanwhile.
    assert all(weights[name] is parameter for name, parameter in model.named_parameters())
    return exe, plan, factors, folder


def test_a_process_with_torch_alone_samples_what_the_oracle_does(mixed, tmp_path):
    exe, plan, factors, folder = mixed
    wanted, _ = run_loop(Oracle.of(exe.model, plan, dict(factors.maps)), DDIM, noise(2), STEPS, 3.0, CLASSES, NULL)
    got = run_fresh(folder, {"noise": noise(2), **CLASSES, **negative(NULL)}, tmp_path, 3.0)
    assert error(got, wanted) <= SAME_EXPORTED_RUN
    full, _ = run_loop(exe.model, DDIM, noise(2), STEPS, 3.0, CLASSES, NULL)
    assert error(got, full) > 1e-4


@pytest.mark.slow
def test_the_shipped_model_is_sampled_without_stepgraph(tmp_path):
    model, scheduler = small_glyph_dit(layers=2), load_scheduler("glyph-dit")
    plan, factors = mixed_plan(model, scheduler, 6, 8)
    exe = sg.compile(model, plan, sg.example_inputs(model, 4), backend="eager", factors=factors)
    start = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    given = {"class_labels": torch.tensor([3, 7]), "negative_class_labels": torch.tensor([10, 10])}
    wanted = sg.sample(exe, scheduler, start, 2.0, **given)
    folder = exe.export(tmp_path / "glyphs", scheduler=scheduler)
    assert error(run_fresh(folder, {"noise": start, **given}, tmp_path, 2.0), wanted) <= SAME_EXPORTED_RUN


def test_weights_lie_in_one_file_and_nowhere_else(mixed):
    exe, _, _, folder = mixed
    model = dict(exe.model.named_parameters()) | dict(exe.model.named_buffers())
    with safe_open(folder / "weights.safetensors", "pt") as file:
        names = set(file.keys())
        stored = {name: file.get_tensor(name) for name in names}
    own = {name for name in names if not name.startswith(("constants.", "coefficients."))}
    assert all(torch.equal(stored[name], model[name]) for name in own)
    assert {name for name, _ in exe.model.named_parameters()} == own - set(dict(exe.model.named_buffers()))
    # Rank 4, width 32 and the feed-forward's 128: two maps a block, whatever number of variants corrects them.
    maps = {tuple(stored[name].shape) for name in names if name.startswith("constants.")}
    assert maps == {(4, 32), (128, 4), (4, 128), (32, 4)}
    assert sum(name.startswith("constants.") for name in names) == 2 * 2 * 2
    programs = sorted((folder / "programs").iterdir())
    assert [path.stem for path in programs] == ["prompt", "timestep", *(f"variant-{i:03d}" for i in range(3))]
    for path in programs:
        assert_holds_no_tensors(path)


def assert_holds_no_tensors(path: Path) -> None:
    """A program has neither weights nor example inputs, and says nothing of where it was made."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.partition("/")[2]: archive.read(entry) for entry in archive.namelist()}
    assert json.loads(entries["data/weights/model_weights_config.json"]) == {"config": {}}
    assert json.loads(entries["data/constants/model_constants_config.json"]) == {"config": {}}
    assert not entries["data/sample_inputs/model.pt"]
    assert b"stepgraph" not in entries["models/model.json"]
    assert b".py" not in entries["models/model.json"]


def test_the_schedule_is_the_plan(mixed):
    _, plan, _, folder = mixed
    schedule = json.loads((folder / "schedule.json").read_text())
    assert tuple(schedule["variants"][step["variant"]]["row"] for step in schedule["steps"]) == plan.rows
    assert tuple(step["timestep"] for step in schedule["steps"]) == plan.header.timesteps
    assert [entry["name"] for entry in schedule["inputs"]] == ["hidden_states", "timestep", "class_labels"]
    assert schedule["inputs"][0] == {"name": "hidden_states", "shape": [4, 4, 8, 8], "dtype": "float32"}
    held: set[int] = set()
    for step in schedule["steps"]:
        assert held >= set(step["reads"])
        assert not held & set(step["stores"])
        held = (held | set(step["stores"])) - set(step["frees"])
    assert not held
    # DDIM: x' = a x + b output, a of all steps together what takes the noise's share out.
    alphas = DDIM.alphas_cumprod
    ends = [*plan.header.timesteps[1:], -1]
    for (latents, output), t, end in zip(schedule["sampler"]["terms"], plan.header.timesteps, ends, strict=True):
        alpha, after = float(alphas[int(t)]), float(alphas[int(end)] if end >= 0 else DDIM.final_alpha_cumprod)
        assert latents == [0, 0, pytest.approx((after / alpha) ** 0.5)]
        assert output == [0, 1, pytest.approx((1 - after) ** 0.5 - ((1 - alpha) * after / alpha) ** 0.5, abs=1e-6)]


@pytest.mark.parametrize(
    ("name", "guidance", "options"),
    [("dpm++", "separate", {}), ("heun", "batched", {"hoist": False}), ("euler", "batched", {"exact": True})],
)
def test_other_samplers_branches_and_options(tmp_path, name, guidance, options):
    model, scheduler = tiny_dit(), tiny_scheduler(name)
    plan = sg.make_plan("interval", model=model, scheduler=scheduler, steps=4, every=2, guidance=guidance)
    batch = 1 if guidance == "separate" else 2
    given = inputs(batch) | {"timestep": torch.zeros(batch)}
    exe = sg.compile(model, plan, given, backend="eager", **options)
    runner = Runner(exe.export(tmp_path / "out", scheduler=scheduler))
    conditioning = {**labels(5), "negative_class_labels": torch.tensor([NULL_CLASS])}
    wanted = sg.sample(exe, scheduler, noise(1), 2.5, **conditioning)
    assert error(runner.sample(noise(1), 2.5, **conditioning), wanted) <= SAME_EXPORTED_RUN
    hoisted = options.get("hoist", True)
    assert runner.schedule["tables"]["batched"] == (hoisted and not options.get("exact"))
    assert ("prompt" in runner.schedule["programs"]) == hoisted


# 512 bytes of a class embedding at prompt level; the timestep as float32 takes 16 bytes a step.
@pytest.mark.slow
@pytest.mark.parametrize(("steps", "limit", "programs"), [(6, 0.0005, {"timestep"}), (40, 0.0006, {"prompt"})])
def test_a_limit_may_leave_tables_of_one_level_alone(tmp_path, steps, limit, programs):
    model = tiny_dit()
    plan, factors = mixed_plan(model, DDIM, steps, 4)
    exe = sg.compile(model, plan, inputs(4), backend="eager", factors=factors, hoist_limit_mb=limit)
    runner = Runner(exe.export(tmp_path / "out", scheduler=DDIM))
    assert {name for name in runner.schedule["programs"] if not name.startswith("variant")} == programs
    wanted, _ = run_loop(Oracle.of(model, plan, dict(factors.maps)), DDIM, noise(2), steps, 3.0, CLASSES, NULL)
    assert error(runner.sample(noise(2), 3.0, **CLASSES, **negative(NULL)), wanted) <= SAME_EXPORTED_RUN


def test_fused_operations_stay_on_request(mixed, tmp_path):
    exe, _, _, portable = mixed
    own = exe.export(tmp_path / "own", portable=False)
    fused = {f"stepgraph.{name.replace(' by ', '_')}" for name in exe.providers() if not name.endswith("by reference")}

    def found(folder: Path) -> set[str]:
        entries = [zipfile.ZipFile(path) for path in (folder / "programs").glob("variant*")]
        text = "".join(archive.read(n).decode() for archive in entries for n in archive.namelist() if n.endswith("model.json"))
        return {name for name in fused if f"torch.ops.{name}.default" in text}

    assert found(own) == fused
    assert not found(portable)
    assert "none was given" in json.loads((own / "schedule.json").read_text())["sampler"]["reason"]
    with pytest.raises(ScheduleError, match="has no sampler: none was given"):
        Runner(own).sample(noise(2), 3.0, **CLASSES, **negative(NULL))


def test_a_folder_is_replaced_only_if_it_is_an_export_and_on_request(mixed, tmp_path, monkeypatch):
    exe, *_ = mixed
    (tmp_path / "file").write_text("mine")
    with pytest.raises(sg.CompileError, match="is a file; an export is a folder"):
        exe.export(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "schedule.json").write_text('{"format": "timetable"}')
    with pytest.raises(sg.CompileError, match="holds something that is no export"):
        exe.export(tmp_path / "other", force=True)
    with pytest.raises(sg.CompileError, match=r"unknown format 'tflite' of exports; expected pt2"):
        exe.export(tmp_path / "new", "tflite")
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "schedule.json").write_text('{"format": "stepgraph-pt2"}')
    with pytest.raises(sg.CompileError, match=r"holds an export already; pass force=True"):
        exe.export(ours)
    # A failure half-way leaves what was there, and nothing beside it.
    monkeypatch.setattr(export_pt2, "save_tensors", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        exe.export(ours, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert [path.name for path in ours.iterdir()] == ["schedule.json"]


@pytest.mark.parametrize("path", [".", "..", "../../out"])
def test_the_current_folder_is_not_replaced(mixed, tmp_path, monkeypatch, path):
    folder = tmp_path / "out" / "programs"
    folder.mkdir(parents=True)
    (folder.parent / "schedule.json").write_text('{"format": "stepgraph-pt2"}')
    monkeypatch.chdir(folder)
    with pytest.raises(sg.CompileError, match=r"the current folder lies at or below .*; name a folder in it"):
        mixed[0].export(path, force=True)
    assert Path.cwd() == folder
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_exported_is_said(dit, ddim, tmp_path):
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=4, every=2)
    narrow = sg.compile(dit, plan, inputs(2), backend="eager", slot_dtype="bfloat16")
    with pytest.raises(sg.CompileError, match="slot_dtype is 'bfloat16', but an export keeps"):
        narrow.export(tmp_path / "out")
    exe = sg.compile(dit, plan, inputs(2), backend="eager")
    with pytest.raises(sg.PlanError, match="compiled for DDIMScheduler, but the scheduler of this export"):
        exe.export(tmp_path / "out", scheduler=tiny_scheduler("euler"))
    euler = sg.make_plan("interval", model=dit, scheduler=tiny_scheduler("euler"), steps=5, every=2)
    with pytest.raises(sg.CompileError, match=r"compiled for timesteps of int64; pass inputs with a timestep of float32"):
        sg.compile(dit, euler, inputs(2), backend="eager").export(tmp_path / "out")
    clipped = Runner(exe.export(tmp_path / "out", scheduler=ddim))
    assert "set with clip_sample=True" in clipped.schedule["sampler"]["reason"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_runner_says_what_does_not_fit(mixed, tmp_path):
    *_, folder = mixed
    runner = Runner(folder)
    with pytest.raises(ScheduleError, match="the input negative_class_labels is missing"):
        runner.sample(noise(2), 3.0, **CLASSES)
    with pytest.raises(ScheduleError, match=r"hidden_states has the shape \[2, 4, 8, 8\]; exported for \[4, 4, 8, 8\]"):
        runner.sample(noise(2), **CLASSES)
    session, given = runner.session(), {"class_labels": torch.tensor([1, 2, 3, 4])}
    with pytest.raises(ScheduleError, match=r"step 0 got the timestep \[7, 7, 7, 7\]; its tables are for "):
        session(noise(4), 7, given)
    session = runner.session()
    for step in runner.schedule["steps"]:
        session(noise(4), step["timestep"], given)
    with pytest.raises(ScheduleError, match="all 6 steps have run"):
        session(noise(4), 0, given)
    if not torch.cuda.is_available():
        (tmp_path / "schedule.json").write_text('{"format": "stepgraph-pt2", "version": 1, "device": "cuda:0"}')
        with pytest.raises(ScheduleError, match=r"was exported for cuda:0, and torch finds no CUDA device"):
            Runner(tmp_path)
    (tmp_path / "schedule.json").write_text('{"format": "stepgraph-pt2", "version": 99}')
    with pytest.raises(ScheduleError, match=r"is of the format \('stepgraph-pt2', 99\)"):
        Runner(tmp_path)


def test_inputs_of_another_name_or_kind_of_dtype_are_refused(mixed):
    runner, given = Runner(mixed[-1]), {"class_labels": torch.tensor([1, 2, 3, 4])}
    first = runner.schedule["steps"][0]["timestep"]
    cases = [
        ({}, first, "the input class_labels is missing; expected are class_labels"),
        ({**given, "label": given["class_labels"]}, first, "the input label is unknown; expected are class_labels"),
        (
            {"class_labels": torch.tensor([1.0, 2.0, 3.0, 4.0])},
            first,
            "class_labels is of torch.float32; exported for torch.int64",
        ),
        (given, first + 0.5, f"timestep is {first + 0.5:g} of torch.float32; exported for torch.int64"),
    ]
    for conditioning, timestep, message in cases:
        with pytest.raises(ScheduleError, match=message):
            runner.session()(noise(4), timestep, conditioning)
    # Whole timesteps in floating point, as Euler's, and narrower labels lose nothing.
    wanted = runner.session()(noise(4), torch.full((4,), int(first)), given)
    assert torch.equal(
        runner.session()(noise(4), torch.full((4,), first), {"class_labels": given["class_labels"].int()}), wanted
    )
    with pytest.raises(ScheduleError, match="the input prompt is unknown; expected are class_labels, negative_class_labels"):
        runner.sample(noise(2), 3.0, prompt=noise(2), **CLASSES, **negative(NULL))
    # A file of conditioning for guidance serves without, too.
    runner.sample(noise(4), 1.0, **given, negative_class_labels=given["class_labels"])


@pytest.mark.parametrize("change", ["another tensor", "written to", "equal"])
def test_conditioning_that_changes_within_a_run_is_used(mixed, change):
    exe, *_, folder = mixed
    runner, given = Runner(folder), torch.tensor([1, 2, 3, 4])
    calls = []
    load, runner.call = runner.call, lambda name, *tensors: calls.append(name) or load(name, *tensors)
    session, own = runner.session(), exe.session()
    for step in runner.schedule["steps"]:
        if step is runner.schedule["steps"][3]:
            given = given.clone() if change == "equal" else given.flip(0) if change == "another tensor" else given.add_(1)
        timestep = torch.full((4,), int(step["timestep"]))
        wanted = own(hidden_states=noise(4), timestep=timestep, class_labels=given, return_dict=False)[0]
        assert error(session(noise(4), timestep, {"class_labels": given}), wanted) <= SAME_EXPORTED_RUN
    assert calls.count("timestep") == (1 if change == "equal" else 2)


def test_what_was_damaged_on_its_way_is_not_sampled(mixed, tmp_path):
    folder = Path(shutil.copytree(mixed[-1], tmp_path / "copy"))
    given = {"class_labels": torch.tensor([1, 2, 3, 4])}
    flip(folder / "programs" / "prompt.pt2")
    with pytest.raises(ScheduleError, match=r"prompt\.pt2 is not what was exported: its SHA-256 is"):
        Runner(folder).sample(noise(4), **given)
    flip(folder / "programs" / "prompt.pt2")
    flip(folder / "weights.safetensors")
    with pytest.raises(ScheduleError, match=r"weights\.safetensors is not what was exported"):
        Runner(folder)
    damaged = Runner(folder, verify=False).sample(noise(4), **given)
    flip(folder / "weights.safetensors")
    assert not torch.equal(Runner(folder).sample(noise(4), **given), damaged)
    schedule = json.loads((folder / "schedule.json").read_text())
    del schedule["sha256"]["weights.safetensors"]
    (folder / "schedule.json").write_text(json.dumps(schedule))
    with pytest.raises(ScheduleError, match=r"no SHA-256 of weights\.safetensors; export again"):
        Runner(folder)


def flip(path: Path) -> None:
    """Turn over a bit of the last byte, which in a float32 holds the exponent."""
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 0x40]))


def test_the_command_says_in_one_line_what_is_wrong(mixed, tmp_path, monkeypatch, capsys):
    def complaint(folder: Path, *arguments: Path | str) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(folder / "run.py"), run_name="__main__")
        said = capsys.readouterr().err
        assert ended.value.code == 1
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    folder = Path(shutil.copytree(mixed[-1], tmp_path / "copy"))
    write_tensors(tmp_path / "given", {"class_labels": torch.tensor([1, 2, 3, 4])})
    (tmp_path / "short").write_bytes((tmp_path / "given").read_bytes()[:-1])
    for given, message in (("nope", "there is no file nope"), (tmp_path / "short", "is damaged: its tensors are not what")):
        assert message in complaint(folder, given, tmp_path / "out")
    for name, message in (
        ("programs/prompt.pt2", "is not what was exported"),
        ("schedule.json", "is no schedule of an export"),
    ):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-20])
        assert message in complaint(folder, tmp_path / "given", tmp_path / "out")
        (folder / name).write_bytes(whole)
    assert not (tmp_path / "out").exists()


def with_length(header: bytes) -> bytes:
    """The beginning of a safetensors file."""
    return len(header).to_bytes(8, "little") + header


def test_the_runners_own_reader_and_writer(tmp_path):
    given = {
        "a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2, 3).bfloat16(), "d": torch.tensor(2.5),
        "e": torch.ones(0, 4), "f": torch.tensor([True, False, True]), "g": torch.randn(2),
    }  # fmt: skip
    save_file(given, tmp_path / "theirs.safetensors", metadata={"kept": "out"})
    write_tensors(tmp_path / "ours.safetensors", given)
    for found in (read_tensors(tmp_path / "theirs.safetensors"), load_file(tmp_path / "ours.safetensors")):
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in given.items())
    # Of another writer: the numbers begin at an odd byte.
    header = (
        b'{"b": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}, "x": {"dtype": "F32", "shape": [], "data_offsets": '
    )
    odd = header + b"[1, 5]}}"
    (tmp_path / "odd").write_bytes(with_length(odd) + b"\1" + struct.pack("<f", 2.5))
    assert read_tensors(tmp_path / "odd") == {"b": torch.tensor([True]), "x": torch.tensor(2.5)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no safetensors file: its header would end at byte 8 of 0"),
        (b"\xff" * 20, "is no safetensors file: its header would end"),
        (with_length(b"{{{{"), "its header is no JSON object"),
        (with_length(b"12"), "its header is no JSON object"),
        (with_length(b'{"x": {}}'), "is damaged"),
        (with_length(b'{"x": {"dtype": "F99", "shape": [0], "data_offsets": [0, 0]}}'), "the dtype 'F99' is none of F64"),
        (with_length(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'), "one lies at bytes 0 to 4 of 0"),
        (with_length(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 0]}}'), "is damaged"),
    ],
)
def test_files_that_are_not_safetensors_are_said(tmp_path, content, message):
    (tmp_path / "no").write_bytes(content)
    with pytest.raises(ScheduleError, match=message):
        read_tensors(tmp_path / "no")
