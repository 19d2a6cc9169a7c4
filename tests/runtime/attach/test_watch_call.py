"""What a watched call of a pipeline learns, that it leaves everything as it was, and what it refuses."""

import copy
import random
from contextlib import nullcontext

import diffusers
import numpy as np
import pytest
import torch

import stepgraph as sg
from helpers.any_pipes import any_pipe, latents
from helpers.pipes import tiny_pipe
from helpers.text_pipes import flux_pipe, sd3_pipe
from helpers.tiny import tiny_dit
from stepgraph.errors import CompileError, PlanError


def prompt(pooled: int = 10) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 5, 12, generator=generator)
    return {"prompt_embeds": text, "pooled_prompt_embeds": torch.randn(1, pooled, generator=generator)}


def call(steps: int = 4, **more) -> dict:
    return {**prompt(), "height": 8, "width": 8, "num_inference_steps": steps, "output_type": "latent", **more}


@pytest.fixture
def pipe():
    return flux_pipe()


def test_the_inputs_are_those_of_the_first_step(pipe):
    seen, forward = [], pipe.transformer.forward

    def recorded(**inputs):
        seen.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return forward(**inputs)

    given = call(latents=torch.randn(1, 16, 4))
    watched = sg.watch(pipe, **given)
    pipe.transformer.forward = recorded
    pipe(**given)
    (inputs,) = watched.inputs
    assert next(iter(inputs)) == "hidden_states"
    assert {name for name, value in inputs.items() if isinstance(value, torch.Tensor)} == set(seen[0])
    assert all(torch.equal(inputs[name], value) for name, value in seen[0].items())
    assert (watched.steps, watched.guidance, watched.branches) == (4, "batched", ("cond",))
    assert watched.schedule.sigmas == (1.0, 0.75, 0.5, 0.25)
    assert [float(entry["timestep"]) for entry in seen] == pytest.approx((pipe.scheduler.timesteps / 1000).tolist())


def test_calls_of_true_guidance_are_named(pipe):
    negative = {f"negative_{name}": torch.zeros_like(value) for name, value in prompt().items()}
    watched = sg.watch(pipe, **call(true_cfg_scale=2.0, **negative))
    assert (watched.guidance, watched.branches) == ("separate", ("cond", "uncond"))
    assert not watched.inputs[1]["encoder_hidden_states"].any()


@pytest.mark.parametrize(("strength", "begin"), [(1.0, 0), (0.5, 2), (0.25, 3)])
def test_image_to_image_begins_later(strength, begin):
    pipe = flux_pipe(diffusers.FluxImg2ImgPipeline)
    watched = sg.watch(pipe, **call(strength=strength, image=torch.rand(1, 3, 8, 8)))
    assert (watched.schedule.begin, watched.steps) == (begin, 4)


def test_a_run_of_one_step_is_watched_too(pipe):
    assert sg.watch(pipe, **call(1)).steps == 1


def test_sigmas_of_the_call_are_the_schedules(pipe):
    watched = sg.watch(pipe, **call(3, sigmas=[1.0, 0.6, 0.1]))
    assert (watched.schedule.sigmas, watched.steps) == ((1.0, 0.6, 0.1), 3)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails):
    pipe, calls = any_pipe("wan")
    given = calls(0)
    latents(pipe, calls(5))
    of_pipe, of_transformer, of_scheduler = (dict(vars(owner)) for owner in (pipe, pipe.transformer, pipe.scheduler))
    copied = copy.deepcopy(of_scheduler)
    states = given["generator"].get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    drawn = []

    def draw(*_):
        drawn.append((torch.rand(1), random.random(), np.random.rand()))
        if fails:
            raise BrokenError("in the middle of the first step")

    handle = pipe.transformer.blocks[1].register_forward_pre_hook(draw)
    with pytest.raises(BrokenError) if fails else nullcontext():
        sg.watch(pipe, **given)
    handle.remove()
    assert drawn
    for owner, attributes in ((pipe, of_pipe), (pipe.transformer, of_transformer), (pipe.scheduler, of_scheduler)):
        assert vars(owner).keys() == attributes.keys()
        assert all(value is attributes[name] for name, value in vars(owner).items())
    assert torch.equal(pipe.scheduler.timesteps, copied["timesteps"])
    assert pipe.scheduler.step_index == copied["_step_index"]
    assert all(map(torch.equal, pipe.scheduler.model_outputs, copied["model_outputs"]))
    assert torch.equal(given["generator"].get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[3]).all()
    assert torch.equal(latents(pipe, given), latents(pipe, calls(0)))


def test_callbacks_are_left_out(pipe):
    called = []
    sg.watch(pipe, **call(callback_on_step_end=lambda *_: called.append(1) or {}))
    assert not called


def test_only_the_first_step_is_computed(pipe):
    calls = []
    handle = pipe.transformer.x_embedder.register_forward_hook(lambda *_: calls.append(1))
    sg.watch(pipe, **call())
    handle.remove()
    assert calls == [1]


def test_what_one_timestep_leaves_open_the_others_tell():
    """At the first step of Chroma's schedule, 1000, a cast before and behind the division gives the same bits."""
    pipe, calls = any_pipe("chroma")
    pipe.transformer.to(torch.bfloat16)
    given = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in calls(0).items()}
    watched = sg.watch(pipe, **given | {"num_inference_steps": 8})
    assert watched.timestep.operations == ("cast", "/1000")


def test_a_scheduler_that_others_are_attached_with_stays_theirs(tmp_path):
    pipe = tiny_pipe(tiny_dit())
    other = diffusers.DiTPipeline(tiny_dit(seed=1), pipe.vae, pipe.scheduler)
    exe = sg.accelerate(pipe, 4, "full", backend="eager", cache=tmp_path)
    covered = dict(vars(pipe.scheduler))
    sg.watch(other, class_labels=[1], num_inference_steps=4)
    assert all(value is covered[name] for name, value in vars(pipe.scheduler).items())
    exe.detach()
    assert "step" not in vars(pipe.scheduler)


def test_a_broken_call_passes_unchanged(pipe):
    with pytest.raises(PlanError, match="FluxPipeline cannot be called with nose: got an unexpected keyword argument 'nose'"):
        sg.watch(pipe, nose=1)
    with pytest.raises(ValueError, match="Provide either"):
        sg.watch(pipe, prompt=None)


def test_an_attached_pipeline_is_refused(tmp_path):
    pipe = tiny_pipe(tiny_dit())
    exe = sg.accelerate(pipe, 4, "full", backend="eager", cache=tmp_path)
    with pytest.raises(CompileError, match="an executable is attached to the pipeline's transformer; detach it before"):
        sg.watch(pipe, class_labels=[1], num_inference_steps=4)
    exe.detach()
    assert sg.watch(pipe, class_labels=[1], num_inference_steps=4).guidance == "batched"


class Stub:
    """A pipeline of the few lines that a case needs."""

    def __init__(self, run, transformer=None, scheduler=None) -> None:
        self.transformer = tiny_dit() if transformer is None else transformer
        self.scheduler = scheduler or diffusers.DDIMScheduler()
        self._run = run

    @torch.no_grad()
    def __call__(self, **_):
        self._run(self)

    def predict(self, timestep, **inputs):
        latents = torch.zeros(1, 4, 8, 8)
        return self.transformer(latents, timestep=timestep, class_labels=torch.tensor([1]), **inputs).sample[:, :4]


def stepping(make):
    """A loop whose timesteps are made of the scheduler's."""

    def run(pipe):
        pipe.scheduler.set_timesteps(4)
        for t in pipe.scheduler.timesteps:
            pipe.scheduler.step(pipe.predict(make(t)), t, torch.zeros(1, 4, 8, 8))

    return run


def three_calls(pipe):
    pipe.scheduler.set_timesteps(2)
    for t in pipe.scheduler.timesteps:
        output = sum(pipe.predict(t.reshape(1)) for _ in range(3)) / 3
        pipe.scheduler.step(output, t, torch.zeros(1, 4, 8, 8))


def moved(pipe):
    pipe.scheduler.set_timesteps(4)
    pipe.scheduler.timesteps = pipe.scheduler.timesteps + 1
    pipe.scheduler.step(pipe.predict(pipe.scheduler.timesteps[:1]), 751, torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda pipe: None, "the call of Stub never called its transformer"),
        (lambda pipe: pipe.predict(torch.tensor([1])), "Stub called its transformer before its scheduler's set_timesteps"),
        (lambda pipe: (pipe.scheduler.set_timesteps(4), pipe.predict(torch.tensor([750]))), "1 times, and never its scheduler"),
        (stepping(lambda t: t.reshape(1) / 7), r"the timesteps \[107\.\d+, 71\.\d+, .*\], \.\.\. where the scheduler has"),
        (stepping(lambda t: torch.stack([t, t + 1])), "the call has several timesteps"),
        (moved, r"runs on the timesteps \[751, .*\], which set_timesteps with 4 steps and .* does not give"),
    ],
    ids=["nothing", "never set", "never stepped", "unknown unit", "several", "moved"],
)
def test_what_no_plan_can_state_is_refused(run, message):
    pipe = Stub(run)
    with pytest.raises(sg.StepgraphError, match=message):
        sg.watch(pipe)
    assert "forward" not in vars(pipe.transformer)
    assert not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()


def test_three_calls_a_step_are_seen_and_have_no_plan(tmp_path):
    pipe = Stub(three_calls)
    assert len(sg.watch(pipe).inputs) == 3
    with pytest.raises(PlanError, match="a step has 3 calls of the transformer"):
        sg.accelerate(pipe, policy="full", call={}, cache=tmp_path)


def test_pipelines_without_a_transformer_are_refused():
    class Unet:
        unet = torch.nn.Linear(1, 1)

    with pytest.raises(CompileError, match="Unet has no transformer to watch; plans are for transformers, and U-Nets are what"):
        sg.watch(Unet())
    with pytest.raises(CompileError, match="the scheduler of Stub is 3; expected a diffusers scheduler"):
        sg.watch(Stub(None, scheduler=3))


def test_arguments_of_set_timesteps_that_plans_do_not_know_are_refused():
    def run(pipe):
        pipe.scheduler.set_timesteps(4, jump_length=2)
        pipe.scheduler.step(pipe.predict(pipe.scheduler.timesteps[:1]), 0, torch.zeros(1, 4, 8, 8))

    scheduler = diffusers.DDIMScheduler()
    whole = scheduler.set_timesteps
    scheduler.set_timesteps = lambda steps, jump_length=1: whole(steps)
    with pytest.raises(CompileError, match="Stub sets its scheduler with jump_length=2, which no plan can state"):
        sg.watch(Stub(run, scheduler=scheduler))


def test_calls_of_other_arguments_are_no_guidance(tmp_path):
    pipe = sd3_pipe()
    negative = {f"negative_{name}": torch.zeros_like(value) for name, value in prompt().items()}
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    with pytest.raises(PlanError, match="do not differ in sizes and values alone: skip_layers is given in one of them only"):
        sg.accelerate(pipe, policy="full", call=call(guidance_scale=4.0, **negative, **skipping), cache=tmp_path)


def test_batched_guidance_is_one_call():
    pipe = sd3_pipe()
    negative = {f"negative_{name}": torch.zeros_like(value) for name, value in prompt().items()}
    watched = sg.watch(pipe, **call(guidance_scale=4.0), **negative)
    assert (watched.guidance, watched.inputs[0]["hidden_states"].shape[0]) == ("batched", 2)
