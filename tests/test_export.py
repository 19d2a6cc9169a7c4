"""Exports: equal to the executable in a process without stepgraph, weights once, folders whole or not at all."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import NULL_CLASS, inputs, labels, noise, tiny_dit, tiny_scheduler
from oracle import Oracle, run_loop
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stepgraph as sg
from stepgraph.compiler.models.load import load_model, load_scheduler
from stepgraph.plan import CachePlan
from stepgraph.runtime import export_pt2
from stepgraph.runtime.runner import Runner, ScheduleError, read_tensors, write_tensors

STEPS = 6
# Without clipping, as DiT's own configuration has it: then every step is a fixed linear combination.
DDIM = diffusers.DDIMScheduler(clip_sample=False)
CLASSES = {"class_labels": torch.tensor([1, 2])}
NULL = {"class_labels": torch.tensor([NULL_CLASS, NULL_CLASS])}
# A process in which stepgraph cannot be imported, nor anything else that torch does not bring.
FRESH = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.modules.update(dict.fromkeys(["stepgraph", "diffusers", "safetensors", "transformers"]))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def negative(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"negative_{name}": value for name, value in given.items()}


def mixed_plan(model, scheduler, steps: int, rank: int) -> tuple[CachePlan, sg.Factors]:
    """Every second step: ff LOWRANK, the first attention FORECAST and the others REUSE."""
    plan = sg.make_plan("interval", model=model, scheduler=scheduler, steps=steps, every=2, kinds=["attn", "ff"])
    plan = sg.lowrank(plan, kinds=["ff"])
    plan = sg.forecast(plan, sites=[next(site.name for site in plan.sites if site.kind == "attn")])
    factors = sg.factorize(model, method="svd", rank=rank)
    assert {letter for row in plan.rows for letter in row} == set("CRLF")
    return replace(plan, header=replace(plan.header, factors=factors.digest)), factors


def run_fresh(folder: Path, given: dict[str, torch.Tensor], tmp_path: Path, guidance: float) -> torch.Tensor:
    """Latents of the export's own run.py in a process of its own."""
    save_file(given, tmp_path / "given.safetensors")
    site = Path(torch.__file__).parents[1]
    command = [
        "-I",
        "-S",
        "-c",
        FRESH,
        site,
        folder / "run.py",
        tmp_path / "given.safetensors",
        tmp_path / "latents.safetensors",
    ]
    result = subprocess.run(
        [sys.executable, *map(str, command), "--guidance", str(guidance)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    return load_file(tmp_path / "latents.safetensors")["latents"]


def error_of(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((given - wanted).norm() / wanted.norm())


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
    assert error_of(got, wanted) <= 1e-5
    full, _ = run_loop(exe.model, DDIM, noise(2), STEPS, 3.0, CLASSES, NULL)
    assert error_of(got, full) > 1e-4


@pytest.mark.slow
def test_the_shipped_model_is_sampled_without_stepgraph(tmp_path):
    model, scheduler = load_model("glyph-dit", torch.device("cpu"), torch.float32), load_scheduler("glyph-dit")
    plan, factors = mixed_plan(model, scheduler, 10, 8)
    exe = sg.compile(model, plan, sg.example_inputs(model, 4), backend="eager", factors=factors)
    start = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    given = {"class_labels": torch.tensor([3, 7]), "negative_class_labels": torch.tensor([10, 10])}
    wanted = sg.sample(exe, scheduler, start, 2.0, **given)
    folder = exe.export(tmp_path / "glyphs", scheduler=scheduler)
    assert error_of(run_fresh(folder, {"noise": start, **given}, tmp_path, 2.0), wanted) <= 1e-5


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
    assert error_of(runner.sample(noise(1), 2.5, **conditioning), wanted) <= 1e-5
    hoisted = options.get("hoist", True)
    assert runner.schedule["tables"]["batched"] == (hoisted and not options.get("exact"))
    assert ("prompt" in runner.schedule["programs"]) == hoisted


# 512 bytes of a class embedding at prompt level; the timestep as float32 takes 16 bytes a step.
@pytest.mark.parametrize(("steps", "limit", "programs"), [(6, 0.0005, {"timestep"}), (40, 0.0006, {"prompt"})])
def test_a_limit_may_leave_tables_of_one_level_alone(tmp_path, steps, limit, programs):
    model = tiny_dit()
    plan, factors = mixed_plan(model, DDIM, steps, 4)
    exe = sg.compile(model, plan, inputs(4), backend="eager", factors=factors, hoist_limit_mb=limit)
    runner = Runner(exe.export(tmp_path / "out", scheduler=DDIM))
    assert {name for name in runner.schedule["programs"] if not name.startswith("variant")} == programs
    wanted, _ = run_loop(Oracle.of(model, plan, dict(factors.maps)), DDIM, noise(2), steps, 3.0, CLASSES, NULL)
    assert error_of(runner.sample(noise(2), 3.0, **CLASSES, **negative(NULL)), wanted) <= 1e-5


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
    (tmp_path / "schedule.json").write_text('{"format": "stepgraph-pt2", "version": 99}')
    with pytest.raises(ScheduleError, match=r"is of the format \('stepgraph-pt2', 99\)"):
        Runner(tmp_path)


def test_the_runners_own_reader_and_writer(tmp_path):
    given = {
        "a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2, 3).bfloat16(), "d": torch.tensor(2.5),
        "e": torch.ones(0, 4),
    }  # fmt: skip
    save_file(given, tmp_path / "theirs.safetensors", metadata={"kept": "out"})
    write_tensors(tmp_path / "ours.safetensors", given)
    for found in (read_tensors(tmp_path / "theirs.safetensors"), load_file(tmp_path / "ours.safetensors")):
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in given.items())
    (tmp_path / "no").write_bytes(b"\xff" * 20)
    with pytest.raises(ScheduleError, match="is no safetensors file"):
        read_tensors(tmp_path / "no")
