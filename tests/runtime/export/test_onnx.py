"""ONNX exports, run by onnxruntime through the exported runner."""

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.distance import SAME_EXPORTED_RUN, error
from helpers.exports import mixed_plan
from helpers.pixart_sd3 import PIXART
from helpers.small_glyphs import small_glyph_dit
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.compiler.entry.load_model import load_scheduler
from stepgraph.runtime.export import onnx as export_onnx
from stepgraph.runtime.export.runner import Runner


@pytest.fixture
def onnx():
    """Skips where the extra is not installed."""
    for name in (*export_onnx.NEEDED, "onnxruntime"):
        pytest.importorskip(name)


@pytest.mark.slow
@pytest.mark.usefixtures("onnx")
def test_the_shipped_model_is_sampled_by_onnxruntime(tmp_path):
    model, scheduler = small_glyph_dit(layers=2), load_scheduler("glyph-dit")
    plan, factors = mixed_plan(model, scheduler, 4, 8)
    exe = sg.compile(model, plan, sg.example_inputs(model, 2), backend="eager", factors=factors)
    start = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    given = {"class_labels": torch.tensor([3]), "negative_class_labels": torch.tensor([10])}
    wanted = sg.sample(exe, scheduler, start, 2.0, **given)
    folder = exe.export(tmp_path / "glyphs", "onnx", scheduler=scheduler)
    assert {path.suffix for path in (folder / "programs").iterdir()} == {".onnx"}
    assert error(Runner(folder).sample(start, 2.0, **given), wanted) <= SAME_EXPORTED_RUN


@pytest.mark.slow
@pytest.mark.usefixtures("onnx")
def test_a_row_of_reused_pixart_blocks(tmp_path):
    torch.manual_seed(0)
    model, scheduler = diffusers.PixArtTransformer2DModel(**PIXART).eval(), tiny_scheduler("dpm++")
    plan = sg.make_plan("manual", model=model, scheduler=scheduler, steps=2, actions={"transformer_blocks.0": "CR", "ff": "CR"})
    generator = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else torch.ones_like(value)
        for name, value in sg.example_inputs(model, 2).items()
    }
    exe = sg.compile(model, plan, given, backend="eager")
    runner, own = Runner(exe.export(tmp_path / "out", "onnx", scheduler=scheduler)), exe.session()
    session = runner.session()
    conditioning = {name: value for name, value in given.items() if name not in ("hidden_states", "timestep")}
    for step in runner.schedule["steps"]:
        timestep = torch.full((2,), step["timestep"]).to(given["timestep"].dtype)
        wanted = own(**{**given, "timestep": timestep}, return_dict=False)[0]
        assert error(session(given["hidden_states"], step["timestep"], conditioning), wanted) <= SAME_EXPORTED_RUN


def test_what_onnx_does_not_take_is_said(dit, ddim, tmp_path, monkeypatch):
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=2, every=2)
    exe = sg.compile(dit, plan, inputs(1), backend="eager")
    with monkeypatch.context() as patch:
        patch.setattr(export_onnx, "NEEDED", ("onnx_of_tomorrow",))
        with pytest.raises(
            sg.CompileError, match=r"needs onnx_of_tomorrow, which is not installed; pip install 'stepgraph\[onnx\]'"
        ):
            exe.export(tmp_path / "out", "onnx")
    monkeypatch.setattr(export_onnx, "NEEDED", ())
    with pytest.raises(sg.CompileError, match="operations, which ONNX does not have"):
        exe.export(tmp_path / "out", "onnx", portable=False)
    model = tiny_dit().bfloat16()
    plan = sg.make_plan("interval", model=model, scheduler=ddim, steps=2, every=2)
    exe = sg.compile(model, plan, sg.example_inputs(model), backend="eager")
    with pytest.raises(sg.CompileError, match=r"for float32 on the CPU; the model is torch.bfloat16 on cpu"):
        exe.export(tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())
