"""Sizes come from the conditioning that is given, for every family with a free number of tokens."""

import diffusers
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import stepgraph as sg
from helpers.families import FLUX
from helpers.pixart_sd3 import PIXART, SD3
from stepgraph.compiler.marking.describe import planned_inputs
from stepgraph.compiler.models import family_of
from stepgraph.errors import ArgumentError

TEXT = 9


def text(rows: int = 2) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": torch.randn(rows, TEXT, 12, generator=torch.Generator().manual_seed(0))}


def pooled(rows: int = 2) -> dict[str, torch.Tensor]:
    return {"pooled_projections": torch.randn(rows, 10, generator=torch.Generator().manual_seed(1))}


def mask(rows: int = 2) -> dict[str, torch.Tensor]:
    kept = torch.ones(rows, TEXT, dtype=torch.int64)
    kept[:, -2:] = 0
    return {"encoder_attention_mask": kept}


FLOW = diffusers.FlowMatchEulerDiscreteScheduler
# Model, scheduler, conditioning of two samples.
FAMILIES = {
    "pixart": (diffusers.PixArtTransformer2DModel, PIXART, diffusers.DPMSolverMultistepScheduler, {**text(), **mask()}),
    "pixart without a mask": (diffusers.PixArtTransformer2DModel, PIXART, diffusers.DPMSolverMultistepScheduler, text()),
    "sd3": (diffusers.SD3Transformer2DModel, SD3, FLOW, {**text(), **pooled()}),
    "flux": (
        diffusers.FluxTransformer2DModel, FLUX, FLOW,
        {**text(), **pooled(), "img_ids": torch.zeros(16, 3), "guidance": torch.ones(2)},
    ),
}  # fmt: skip


def made(name: str):
    kind, config, scheduler, given = FAMILIES[name]
    torch.manual_seed(0)
    return kind(**config).eval(), scheduler(), given


@pytest.mark.parametrize("name", FAMILIES)
def test_calibration_plan_and_errors_speak_of_the_conditioning(name):
    model, scheduler, given = made(name)
    stats = sg.calibrate(model, scheduler, steps=4, samples=2, conditioning=given)
    plan = sg.make_plan("interval", model=model, scheduler=scheduler, steps=4, guidance="none", conditioning=given)
    for header in (stats.header, plan.header):
        assert header.shapes["encoder_hidden_states"] == (TEXT, 12)
        assert set(header.shapes) == {"hidden_states", "timestep", *given} | ({"txt_ids"} if name == "flux" else set())
    inputs = sg.example_inputs(model, 1, given)
    # A whole forward, counted by torch itself; attention as the two products that it is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**inputs)
    assert plan.header.macs == counter.get_total_flops() // 2
    measured = sg.make_plan("smoothcache", stats, alpha=0.3)
    fewer = {**given, "encoder_hidden_states": given["encoder_hidden_states"][:, :-1]}
    fewer |= {"encoder_attention_mask": mask()["encoder_attention_mask"][:, :-1]} if "encoder_attention_mask" in given else {}
    with pytest.raises(
        sg.PlanError, match="make a plan for this number of tokens, measured with conditioning= of these shapes"
    ):
        sg.compile(model, measured, sg.example_inputs(model, 1, fewer), backend="eager")
    again = planned_inputs(model, family_of(model), plan.header)
    assert {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in inputs.items()}


def test_a_calibrated_plan_says_resolution_where_the_latents_differ():
    model, scheduler, given = made("pixart")
    stats = sg.calibrate(model, scheduler, steps=4, samples=2, conditioning=given)
    inputs = {**sg.example_inputs(model, 1, given), "hidden_states": torch.zeros(1, 4, 16, 16)}
    with pytest.raises(sg.PlanError, match=r"hidden_states of shape .* make a plan for this resolution$"):
        sg.compile(model, sg.make_plan("smoothcache", stats, alpha=0.3), inputs, backend="eager")


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_missing_and_unknown_conditioning_is_refused_by_name(name):
    model, scheduler, given = made(name)
    for call in (
        lambda c: sg.calibrate(model, scheduler, steps=4, samples=2, conditioning=c),
        lambda c: sg.example_inputs(model, 1, c),
        lambda c: sg.make_plan("full", model=model, scheduler=scheduler, steps=4, conditioning=c),
    ):
        with pytest.raises(ArgumentError, match="conditioning lacks encoder_hidden_states"):
            call({n: v for n, v in given.items() if n != "encoder_hidden_states"})
        with pytest.raises(ArgumentError, match="conditioning has class_labels, which"):
            call({**given, "class_labels": torch.zeros(2)})


def test_flux_positions_are_made_for_a_square_image():
    model, scheduler, given = made("flux")
    left = {n: v for n, v in given.items() if n != "img_ids"}
    inputs = {**sg.example_inputs(model, 1, given), "img_ids": torch.zeros(16, 3)}
    stats = sg.calibrate(model, scheduler, steps=4, samples=2, conditioning=left, inputs=inputs)
    rows = torch.arange(4.0).repeat_interleave(4)
    ids = torch.stack([torch.zeros(16), rows, torch.arange(4.0).repeat(4)], 1)
    same = sg.calibrate(model, scheduler, steps=4, samples=2, conditioning={**left, "img_ids": ids}, inputs=inputs)
    assert torch.equal(stats.change, same.change)
    inputs |= {"hidden_states": torch.zeros(1, 12, 4), "img_ids": torch.zeros(12, 3)}
    with pytest.raises(ArgumentError, match="lacks img_ids, and 12 image tokens are no square"):
        sg.calibrate(model, scheduler, steps=4, samples=2, conditioning=left, inputs=inputs)


def test_inputs_and_conditioning_of_other_names_are_refused():
    model, scheduler, given = made("pixart")
    inputs = sg.example_inputs(model, 1, given)
    with pytest.raises(ArgumentError, match="encoder_attention_mask is among inputs only"):
        sg.calibrate(model, scheduler, steps=4, samples=2, conditioning=text(), inputs=inputs)
    inputs.pop("encoder_attention_mask")
    with pytest.raises(ArgumentError, match="encoder_attention_mask is among conditioning only"):
        sg.calibrate(model, scheduler, steps=4, samples=2, conditioning=given, inputs=inputs)


def test_a_sweep_runs_on_the_conditioning(tmp_path):
    model, scheduler, given = made("sd3")
    swept = sg.sweep(
        "interval", model=model, scheduler=scheduler, knob="every", values=[1, 2], steps=4, samples=2, guidance_scale=1.0,
        conditioning=given, schedule={"sigmas": [1.0, 0.7, 0.4, 0.1]},
    )  # fmt: skip
    assert swept.points[0].error < 1e-6
    assert swept.points[1].error > 1e-4
    assert swept.points[0].plan.header.shapes["encoder_hidden_states"] == (TEXT, 12)
    assert swept.points[0].plan.header.timesteps == (1000.0, 700.0, 400.0, 100.0)
