"""Calls that a plan does not have: guidance that is switched off or on within a run, further calls within a step."""

import copy

import diffusers
import pytest
import torch
from diffusers.callbacks import SD3CFGCutoffCallback
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

import stepgraph as sg
from helpers.oracle import Oracle
from helpers.pipes import STEPS
from helpers.pixart_sd3 import sd3_inputs
from helpers.text_pipes import latents, sd3_pipe
from helpers.tiny import NULL_CLASS, inputs, labels
from stepgraph.errors import PlanError


def attached(pipe, actions, given, **arguments) -> sg.Executable:
    common = {"model": pipe.transformer, "scheduler": pipe.scheduler, "steps": STEPS, "example_inputs": given}
    plan = sg.make_plan("manual", actions=actions, **common, **arguments)
    return sg.compile(pipe.transformer, plan, given, backend="eager", exact=True).attach(pipe)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "stepgraph.attach"]


def guided(pipe, **arguments) -> torch.Tensor:
    return latents(pipe, guidance_scale=7.0, num_inference_steps=STEPS, **arguments)


@pytest.fixture(scope="module")
def sd3() -> StableDiffusion3Pipeline:
    return sd3_pipe()


def test_skip_layer_guidance_of_the_real_pipeline(sd3, caplog):
    arguments = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    eager = guided(sd3, **arguments)
    exe = attached(sd3, {}, sd3_inputs(2))
    for _ in range(2):
        assert torch.equal(guided(sd3, **arguments), eager)
    assert len(warnings(caplog)) == 1
    assert "a further call within a step: skip_layers is [1] (not there before)" in warnings(caplog)[0]
    assert len(exe._programs) == 1
    exe.detach()
    assert not torch.equal(guided(sd3), eager)


@pytest.mark.parametrize("actions", [{}, {"ff": "CCRC"}, {"ff": "CRRR"}], ids=["full", "computed", "reused"])
def test_guidance_that_the_real_pipeline_switches_off(sd3, caplog, actions):
    """The images are the eager ones where every step before the change computes everything."""
    cut_off = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    arguments = {"callback_on_step_end": cut_off, "callback_on_step_end_tensor_inputs": cut_off.tensor_inputs}
    exe = attached(sd3, {}, sd3_inputs(2))
    exe.detach()
    eager = guided(sd3, **arguments)
    exe = attached(sd3, actions, sd3_inputs(2))
    image = guided(sd3, **arguments)
    assert torch.equal(image, eager) == (actions.get("ff", "CC")[:2] == "CC")
    assert "is a torch.float32 tensor [1, " in warnings(caplog)[0]
    # From the second step after the change on there is a program for one row.
    assert [(program.batch, program.plan.steps) for program in exe.programs] == [(2, STEPS), (1, 1)]
    whole = guided(sd3)
    exe.detach()
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("late", [False, True], ids=["off", "on"])
def test_a_loop_whose_batch_changes(pipe, late):
    """Guidance that is switched off, or on, at step 2; the conditional half is the first one, as DiT has it."""
    model, scheduler = pipe.transformer, pipe.scheduler

    @torch.no_grad()
    def run(predict=None):
        scheduler.set_timesteps(STEPS)
        latents = inputs(1)["hidden_states"]
        for step, t in enumerate(scheduler.timesteps):
            classes = labels(7, NULL_CLASS) if (step < 2) != late else labels(7)
            count = len(classes["class_labels"])
            out = model(latents.expand(count, -1, -1, -1), timestep=t.expand(count), **classes).sample[:, :4]
            out = out[1:] + 4.0 * (out[:1] - out[1:]) if count == 2 else out
            latents = scheduler.step(out, t, latents).prev_sample
        return latents

    eager = run()
    exe = attached(pipe, {}, inputs(1 if late else 2))
    assert torch.equal(run(), eager)
    exe.detach()
    # Steps 2 and 3: what the plan reuses at step 3 was never stored for this batch, so both compute everything.
    exe = attached(pipe, {"ff": "CCCR"}, inputs(1 if late else 2))
    assert torch.equal(run(), eager)
    exe.detach()


@pytest.mark.parametrize("order", ["cond first", "uncond first"])
@pytest.mark.parametrize("cut", [1, 2, STEPS - 1])
def test_guidance_in_two_calls_that_is_switched_off(pipe, cut, order):
    """The surviving call is told by its conditioning; one that comes in another's place reads nothing of that one."""
    model, scheduler = pipe.transformer, pipe.scheduler
    halves = [labels(7), labels(NULL_CLASS)][:: 1 if order == "cond first" else -1]

    @torch.no_grad()
    def run(predict):
        scheduler.set_timesteps(STEPS)
        latents, wanted = inputs(1)["hidden_states"], int(order != "cond first")
        for step, t in enumerate(scheduler.timesteps):
            calls = halves if step < cut else halves[wanted : wanted + 1]
            outs = [
                predict(latents, timestep=t.expand(1), class_labels=call["class_labels"].clone()).sample[:, :4]
                for call in calls
            ]
            out = outs[1 - wanted] + 4.0 * (outs[wanted] - outs[1 - wanted]) if len(outs) == 2 else outs[0]
            latents = scheduler.step(out, t, latents).prev_sample
        return latents

    eager = run(model)
    exe = attached(pipe, {"ff": "C" * cut + "R" * (STEPS - cut)}, inputs(1), guidance="separate")
    if order == "uncond first":
        # Its stored values would be the unconditional call's, so the model computes everything.
        assert torch.equal(run(model), eager)
    else:
        single = sg.make_plan(
            "manual", model=model, scheduler=scheduler, steps=STEPS, actions={"ff": "C" * cut + "R" + "C" * (STEPS - cut - 1)},
            guidance="separate",
        )  # fmt: skip
        got = run(model)
        exe.detach()
        oracle, calls = Oracle.of(model, single), []

        def answer(*args, **kwargs):
            calls.append(1)
            # The oracle counts two calls a step: the conditional call of the first step after the change is its last.
            return oracle(*args, **kwargs) if len(calls) <= 2 * cut + 1 else model(*args, **kwargs)

        assert torch.equal(got, run(answer))
    exe.detach()


def test_a_further_call_may_come_first(pipe):
    model, scheduler = pipe.transformer, pipe.scheduler
    exe = attached(pipe, {"ff": "CCRC"}, inputs(2))
    oracle = Oracle.of(model, exe.plan)
    forward = type(model).forward.__get__(model)
    scheduler.set_timesteps(STEPS)
    for step, t in enumerate(copy.deepcopy(scheduler.timesteps)):
        main, further = (inputs(rows, seed=step, timestep=int(t)) for rows in (2, 1))
        order = [(oracle, main), (forward, further)] if step == 0 else [(forward, further), (oracle, main), (forward, further)]
        for right, given in order:
            with torch.no_grad():
                assert torch.equal(model(**given).sample, right(**given).sample)
        scheduler.step(main["hidden_states"], t, main["hidden_states"])
    exe.detach()


def test_further_calls_with_the_same_inputs_are_refused(pipe):
    model, scheduler = pipe.transformer, pipe.scheduler
    exe = attached(pipe, {}, inputs(2))
    scheduler.set_timesteps(STEPS)
    first, second = (int(t) for t in scheduler.timesteps[:2])
    model(**inputs(2, timestep=first))
    scheduler.step(inputs(2)["hidden_states"], first, inputs(2)["hidden_states"])
    model(**inputs(2, timestep=second))
    message = rf"a further call of the transformer at timestep {second}, before the scheduler's step.*one call a step"
    with pytest.raises(PlanError, match=message):
        model(**inputs(2, seed=1, timestep=second))
    exe.detach()


def test_a_wider_dict_of_conditioning_is_named(sd3):
    exe = attached(sd3, {}, sd3_inputs(1))
    given = sd3_inputs(1)
    sd3.scheduler.set_timesteps(STEPS)
    given["timestep"] = sd3.scheduler.timesteps[:1].clone()
    sd3.transformer(**given)
    eager = diffusers.SD3Transformer2DModel.forward.__get__(sd3.transformer)
    with torch.no_grad():
        for changed in (
            {"joint_attention_kwargs": {}},
            {"skip_layers": [0, 2]},
            {"encoder_hidden_states": torch.randn(1, 7, 12)},
        ):
            assert torch.equal(sd3.transformer(**given | changed).sample, eager(**given | changed).sample)
    exe.detach()
