"""AOTInductor exports, sampled by the exported Python runner and by the C++ runner in examples/cpp_runner."""

import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

import stepgraph as sg
from helpers.distance import SAME_EXPORTED_RUN, error
from helpers.exports import mixed_plan, run_fresh
from helpers.paths import ROOT
from helpers.small_glyphs import small_glyph_dit
from helpers.tiny import inputs, tiny_dit
from stepgraph.assets.glyphs import contact_sheet
from stepgraph.compiler.entry.load_model import load_scheduler
from stepgraph.runtime.export import aoti as export_aoti
from stepgraph.runtime.export.runner import Runner

SOURCE = ROOT / "examples" / "cpp_runner"
GUIDANCE = 2.0
GIVEN = {
    "noise": torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)),
    "class_labels": torch.tensor([3, 7]),
    "negative_class_labels": torch.tensor([10, 10]),
}


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """The export of two blocks of glyph-dit under a plan of all four actions, its executable and the executable's images."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    model, scheduler = small_glyph_dit(layers=2), load_scheduler("glyph-dit")
    plan, factors = mixed_plan(model, scheduler, 2, 8)
    exe = sg.compile(model, plan, sg.example_inputs(model, 4), backend="eager", factors=factors)
    assert exe.default.hoisted is not None
    images = sg.sample(exe, scheduler, guidance_scale=GUIDANCE, **GIVEN)
    with pytest.MonkeyPatch.context() as patch:
        # Half the time of compiling is the optimisation of the code around the kernels.
        patch.setitem(export_aoti.OPTIONS, "aot_inductor.compile_wrapper_opt_level", "O0")
        folder = exe.export(tmp_path_factory.mktemp("aoti") / "glyphs", "aoti", scheduler=scheduler)
    return exe, folder, images


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    """The C++ runner, built against the installed torch."""
    if shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no cmake, or no C++ compiler")
    folder = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["-S", SOURCE, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", prefix], ["--build", folder]):
        result = subprocess.run(["cmake", *map(str, command)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / "sample"


@pytest.mark.slow
def test_a_process_with_torch_alone_makes_the_same_images(glyphs, tmp_path):
    _, folder, images = glyphs
    assert error(run_fresh(folder, GIVEN, tmp_path, GUIDANCE), images) <= SAME_EXPORTED_RUN


@pytest.mark.slow
def test_a_process_without_python_makes_the_same_images(glyphs, binary, tmp_path):
    _, folder, images = glyphs
    save_file(GIVEN, tmp_path / "given.safetensors")
    files = [folder, tmp_path / "given.safetensors", tmp_path / "latents.safetensors"]
    command = [binary, *files, "--guidance", GUIDANCE, "--picture", tmp_path / "images.ppm"]
    # No variable says where a Python would be.
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env={})
    assert result.returncode == 0, result.stderr
    assert error(load_file(tmp_path / "latents.safetensors")["latents"], images) <= SAME_EXPORTED_RUN
    made, wanted = Image.open(tmp_path / "images.ppm"), contact_sheet(images, zoom=1)
    assert made.size == wanted.size == (48, 24)
    # One level of 255, where rounding went the other way.
    assert max(abs(a - b) for a, b in zip(made.tobytes(), wanted.tobytes(), strict=True)) <= 1
    save_file(GIVEN | {"noise": GIVEN["noise"][:1]}, tmp_path / "given.safetensors")
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env={})
    assert "hidden_states has the shape [2, 3, 24, 24]; exported for [4, 3, 24, 24]" in result.stderr
    save_file(GIVEN | {"class_labels": torch.tensor([3.0, 7.0])}, tmp_path / "given.safetensors")
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env={})
    assert "class_labels is of Float; exported for Long" in result.stderr
    save_file(GIVEN, tmp_path / "given.safetensors")
    refuses_other_files(command, folder, tmp_path / "copy")
    # Neither the runner nor the programs ask for Python's libraries.
    for held in (binary.read_bytes(), *libraries(folder)):
        assert b"libtorch_cpu" in held
        assert b"libtorch_python" not in held
        assert b"libpython" not in held


def refuses_other_files(command: list[object], folder: Path, copy: Path) -> None:
    """One bit of the weights or of a program is another: the C++ runner says which file, or runs the weights when told to."""
    first = json.loads((folder / "schedule.json").read_text())["programs"]["prompt"]["file"]
    for file, more, expected in (("weights.safetensors", [], 1), ("weights.safetensors", ["--no-verify"], 0), (first, [], 1)):
        shutil.copytree(folder, copy)
        contents = bytearray((copy / file).read_bytes())
        contents[-3] ^= 1
        (copy / file).write_bytes(contents)
        parts = [str(part) for part in (command[0], copy, *command[2:], *more)]
        result = subprocess.run(parts, capture_output=True, text=True, check=False, env={})
        assert result.returncode == expected, result.stderr
        wanted, actual = (hashlib.sha256((place / file).read_bytes()).hexdigest() for place in (folder, copy))
        said = f"{copy / file} is not what was exported: its SHA-256 is {actual}, expected {wanted}; copy it again"
        assert (said in result.stderr) == (expected == 1)
        shutil.rmtree(copy)


def libraries(folder: Path) -> list[bytes]:
    """The compiled code of every program."""
    found = []
    for path in sorted((folder / "programs").iterdir()):
        with zipfile.ZipFile(path) as archive:
            found += [archive.read(name) for name in archive.namelist() if name.endswith(".so")]
    return found


@pytest.mark.slow
def test_the_runner_says_what_does_not_fit(binary, tmp_path):
    save_file(GIVEN, tmp_path / "given.safetensors")
    (tmp_path / "schedule.json").write_text('{"format": "stepgraph-pt2", "version": 1}')
    cases = {
        ("--guidance",): "usage: sample EXPORT",
        ("--guidance", "high"): "--guidance is high; expected a number",
        (): "is of the format stepgraph-pt2, version 1; this runner reads version 1 of stepgraph-aoti",
    }
    for more, message in cases.items():
        command = [binary, tmp_path, tmp_path / "given.safetensors", tmp_path / "out.safetensors", *more]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert message in result.stderr
    (tmp_path / "schedule.json").write_text('{"format": ')
    result = subprocess.run([binary, tmp_path, "given", "out"], capture_output=True, text=True, check=False)
    assert "no JSON: expected a value at byte 11" in result.stderr


@pytest.mark.slow
def test_programs_read_one_copy_of_the_weights(glyphs):
    exe, folder, _ = glyphs
    runner, places = Runner(folder), dict[str, dict[str, set[int]]]()
    for name in runner.schedule["programs"]:
        watch(runner, name, places)
    conditioning = {"class_labels": torch.tensor([3, 7, 10, 10])}
    outputs = run_steps(runner, conditioning)
    assert places.keys() == runner.schedule["programs"].keys()
    taken = [(name, place) for by_name in places.values() for name, found in by_name.items() for place in found]
    # A name has one place in all programs, and that is the runner's own.
    assert dict(taken) == {name: runner.weights[name].data_ptr() for name, _ in taken}
    assert len(set(taken)) == len(dict(taken)) < len(taken)
    assert {name for name, _ in exe.model.named_parameters()} <= dict(taken).keys()
    # What lies there is what is read: without the last projection, every variant answers nothing.
    assert all(output.abs().max() > 0.1 for output in outputs)
    for name in ("proj_out_2.weight", "proj_out_2.bias"):
        runner.weights[name].zero_()
    assert all(not output.any() for output in run_steps(runner, conditioning))


def watch(runner: Runner, name: str, places: dict[str, dict[str, set[int]]]) -> None:
    """Note where the weights lie that a program is called with."""
    entry = runner.schedule["programs"][name]
    program = torch._inductor.aoti_load_package(str(runner.folder / entry["file"]))
    assert not program.get_constant_fqns()

    def call(*tensors):
        for weight, tensor in zip(entry["weights"], tensors[entry["inputs"] :], strict=True):
            places.setdefault(name, {}).setdefault(weight, set()).add(tensor.data_ptr())
        return program(*tensors)

    runner._programs[name] = call


def run_steps(runner: Runner, conditioning: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The model's output at every step, for the same latents."""
    session, latents = runner.session(), torch.cat([GIVEN["noise"], GIVEN["noise"]])
    return [session(latents, step["timestep"], conditioning) for step in runner.schedule["steps"]]


def test_programs_take_weights_as_the_file_has_them(ddim, tmp_path):
    model = tiny_dit().to(memory_format=torch.channels_last)
    assert not model.pos_embed.proj.weight.is_contiguous()
    plan = sg.make_plan("interval", model=model, scheduler=ddim, steps=2, every=2)
    folder = sg.compile(model, plan, inputs(1), backend="eager").export(tmp_path / "out")
    for entry in json.loads((folder / "schedule.json").read_text())["programs"].values():
        program = torch.export.load(folder / entry["file"])
        assert all(node.meta["val"].is_contiguous() for node in program.graph.find_nodes(op="placeholder"))


def test_what_cannot_be_compiled_is_said(dit, ddim, tmp_path, monkeypatch):
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=2, every=2)
    exe = sg.compile(dit, plan, inputs(1), backend="eager")
    with pytest.raises(sg.CompileError, match="operations, which libtorch alone does not have"):
        exe.export(tmp_path / "out", "aoti", portable=False)

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(sg.CompileError, match=r"the format 'aoti' needs a C\+\+ compiler .* install one, or export as pt2"):
        exe.export(tmp_path / "out", "aoti")
    assert not list(tmp_path.iterdir())
