"""Pipelines of classes without an adapter, accelerated from their own call: the oracle's latents, prompt after prompt."""

import pytest
import torch

import stepgraph as sg
from helpers.any_pipes import PIPES, any_pipe, latents, oracles
from helpers.text_pipes import flux_pipe
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.errors import CompileError, PlanError

# Calls of a step, what the pipeline sets beside the steps, and what it makes of a timestep.
LEARNT = {
    "wan": ("separate", (), ()),
    "qwen_image": ("separate", ("sigmas", "mu"), ("/1000",)),
    "chroma": ("separate", ("sigmas", "mu"), ("/1000",)),
    "aura_flow": ("batched", (), ("/1000",)),
    "flux_2": ("batched", ("sigmas", "mu"), ("/1000",)),
    "ltx": ("batched", ("sigmas", "mu"), ()),
    "hunyuan_video": ("batched", ("sigmas",), ()),
    "sana": ("batched", (), ("cast",)),
    "cogvideox": ("batched", (), ()),
    "z_image": ("batched", ("sigmas", "mu"), ("1000-", "/1000")),
}


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPGRAPH_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", PIPES)
def test_two_prompts_are_as_the_oracle_has_them(name):
    pipe, call = any_pipe(name)
    eager = latents(pipe, call(1))
    exe = sg.accelerate(pipe, policy="interval", every=2, call=call(0), backend="eager", exact=True)
    header = exe.plan.header
    learnt = (header.guidance, tuple(n for n in ("sigmas", "mu") if getattr(header.schedule, n)), header.timestep.operations)
    assert learnt == LEARNT[name]
    got = [latents(pipe, call(seed)) for seed in (0, 1)]
    exe.detach()
    marked = TracedModel(pipe.transformer).marked(sg.watch(pipe, **call(0)).inputs[0])
    for seed in (0, 1):
        with oracles(pipe.transformer, exe.plan, marked):
            assert torch.equal(latents(pipe, call(seed)), got[seed])
    assert not torch.equal(eager, got[1])
    assert torch.equal(latents(pipe, call(1)), eager)


def test_the_plan_is_kept_and_found_again(tmp_path):
    pipe, call = any_pipe("aura_flow")
    for more in ({}, {}, {"guidance_scale": 1.0}):
        sg.accelerate(pipe, 4, "full", call={**call(0), **more}, backend="eager").detach()
        # Without guidance the inputs have one row, and are the same for each sample.
        assert len(list(tmp_path.glob("plan-full-*.json"))) == 1


def test_steps_may_be_said_once():
    pipe, call = any_pipe("aura_flow")
    given = {name: value for name, value in call(0).items() if name != "num_inference_steps"}
    assert sg.accelerate(pipe, 3, "full", call=given, backend="eager").plan.header.steps == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "smoothcache"}, "the policy 'smoothcache' measures the model on sampling runs, which call= does not make"),
        ({"policy": "whole-step"}, "the policy 'whole-step' measures the model"),
        ({"conditioning": {}}, "conditioning is given beside call, which says it"),
        ({"schedule": {"mu": 1.0}}, "schedule is given beside call"),
        ({"steps": 3}, "steps is 3, but the call runs 4; leave steps out"),
        ({"nose": 1}, "the policy 'interval' has no argument 'nose'"),
    ],
    ids=str,
)
def test_what_the_call_says_itself_is_refused(arguments, message):
    pipe, call = any_pipe("aura_flow")
    with pytest.raises(PlanError, match=message):
        sg.accelerate(pipe, **{"policy": "interval", "backend": "eager", **arguments}, call=call(0))
    assert "forward" not in vars(pipe.transformer)


def test_a_second_expert_is_refused():
    pipe, call = any_pipe("wan")
    pipe.register_modules(transformer_2=pipe.transformer)
    with pytest.raises(CompileError, match="WanPipeline has two transformers, each for a part of the steps"):
        sg.accelerate(pipe, policy="full", call=call(0))


def test_without_a_call_one_is_asked_for():
    pipe, _ = any_pipe("aura_flow")
    with pytest.raises(CompileError, match="call= of accelerate"):
        sg.accelerate(pipe, 4, "full")


def test_timesteps_that_are_copies_from_the_second_step_on_are_followed():
    """HunyuanVideo casts timesteps to the dtype of its latents, which is float32 at the first step alone."""
    pipe, call = any_pipe("hunyuan_video")
    pipe.transformer.to(torch.bfloat16)
    given = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in call(0).items()
    }
    eager = latents(pipe, given)
    exe = sg.accelerate(pipe, policy="full", call=given, backend="eager", exact=True)
    for _ in range(2):
        given["generator"].manual_seed(0)
        assert torch.equal(latents(pipe, given), eager)
    exe.detach()


def test_flux_in_low_precision_casts_as_its_pipeline_does():
    pipe = flux_pipe(dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    call = {
        "prompt_embeds": torch.randn(1, 5, 12, generator=generator).bfloat16(), "height": 8, "width": 8,
        "pooled_prompt_embeds": torch.randn(1, 10, generator=generator).bfloat16(), "output_type": "latent",
        "num_inference_steps": 4, "latents": torch.randn(1, 16, 4, generator=generator).bfloat16(),
    }  # fmt: skip
    eager = pipe(**call).images
    exe = sg.accelerate(pipe, policy="full", call=call, backend="eager", exact=True)
    assert exe.plan.header.timestep.operations == ("cast", "/1000")
    assert torch.equal(pipe(**call).images, eager)
