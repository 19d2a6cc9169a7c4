"""The warning that reusing the output for whole steps is a shorter schedule, and the proof that it is."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.distance import SAME_RUN, error
from helpers.example_plans import HEADER, SITES
from helpers.tiny import inputs, labels, noise
from stepgraph.plan import CachePlan
from stepgraph.plan.corrections import Increment
from stepgraph.scheduler import prepare_scheduler, scheduler_facts

T = 8
PATTERNS = ["CRCRCRCR", "CCRRCRRR"]


def ddim(prediction):
    return diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)


def euler(prediction):
    return diffusers.EulerDiscreteScheduler(prediction_type=prediction)


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler()


def reusing(dit, scheduler, pattern) -> CachePlan:
    return sg.make_plan("manual", model=dit, scheduler=scheduler, steps=T, actions={"output": pattern})


def under_plan(dit, scheduler, pattern) -> torch.Tensor:
    exe = sg.compile(dit, reusing(dit, scheduler, pattern), inputs(1), backend="eager", exact=True)
    return sg.sample(exe, scheduler, noise(), **labels(3))


def predicted(dit, latents, t) -> torch.Tensor:
    return dit(latents.float(), timestep=t.reshape(1), **labels(3), return_dict=False)[0][:, :4].double()


@torch.no_grad()
def shorter_ddim(dit, prediction, pattern) -> torch.Tensor:
    """DDIM's formula (arXiv 2010.02502, eq. 12, sigma 0) in float64 on the computed timesteps alone."""
    scheduler = prepare_scheduler(ddim(prediction), T)
    kept = [t for t, letter in zip(scheduler.timesteps, pattern, strict=True) if letter == "C"]
    alphas = [scheduler.alphas_cumprod[t].double() for t in kept] + [scheduler.final_alpha_cumprod.double()]
    latents = noise().double()
    for t, now, then in zip(kept, alphas, alphas[1:], strict=False):
        output = predicted(dit, latents, t)
        if prediction == "epsilon":
            epsilon, x0 = output, (latents - (1 - now).sqrt() * output) / now.sqrt()
        elif prediction == "sample":
            epsilon, x0 = (latents - now.sqrt() * output) / (1 - now).sqrt(), output
        else:
            epsilon, x0 = (
                now.sqrt() * output + (1 - now).sqrt() * latents,
                now.sqrt() * latents - (1 - now).sqrt() * output,
            )
        latents = then.sqrt() * x0 + (1 - then).sqrt() * epsilon
    return latents


@torch.no_grad()
def shorter_euler(dit, prepared, pattern) -> torch.Tensor:
    """Euler steps of dx = f d sigma in float64 on the computed sigmas alone; f is the output, as for epsilon and flow."""
    kept = [step for step, letter in enumerate(pattern) if letter == "C"]
    sigmas = [prepared.sigmas[step].double() for step in kept] + [prepared.sigmas[-1].double()]
    latents = noise().double() * getattr(prepared, "init_noise_sigma", 1.0)
    for step, now, then in zip(kept, sigmas, sigmas[1:], strict=False):
        scaled = latents / (now**2 + 1).sqrt() if hasattr(prepared, "scale_model_input") else latents
        latents = latents + (then - now) * predicted(dit, scaled, prepared.timesteps[step])
    return latents


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_reusing_the_output_under_ddim_is_the_shorter_schedule(dit, prediction, pattern):
    got = under_plan(dit, ddim(prediction), pattern)
    assert error(got, shorter_ddim(dit, prediction, pattern)) < SAME_RUN
    # It is not what all steps give, so the equality says something.
    assert error(got, shorter_ddim(dit, prediction, "C" * T)) > 1e-3
    assert "that IS a shorter schedule" in reusing(dit, ddim(prediction), pattern).summary().warnings[0]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("make", [flow, lambda: euler("epsilon")], ids=["flow", "euler"])
def test_reusing_the_output_under_euler_is_the_shorter_schedule(dit, make, pattern):
    got = under_plan(dit, make(), pattern)
    prepared = prepare_scheduler(make(), T)
    assert error(got, shorter_euler(dit, prepared, pattern)) < SAME_RUN
    assert error(got, shorter_euler(dit, prepared, "C" * T)) > 1e-3
    assert "that IS a shorter schedule" in reusing(dit, make(), pattern).summary().warnings[0]


def test_a_regular_pattern_is_a_schedule_that_the_scheduler_knows(dit):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    got = under_plan(dit, scheduler, "CRCRCRCR")
    assert error(got, sg.sample(dit, scheduler, noise(), steps=4, **labels(3)).double()) < SAME_RUN


def test_reusing_a_v_prediction_is_no_shorter_schedule_and_does_not_warn(dit):
    got = under_plan(dit, ddim("v_prediction"), PATTERNS[0])
    assert error(under_plan(dit, ddim("v_prediction"), "C" * T), shorter_ddim(dit, "v_prediction", "C" * T)) < SAME_RUN
    assert error(got, shorter_ddim(dit, "v_prediction", PATTERNS[0])) > 1e-3
    assert reusing(dit, ddim("v_prediction"), PATTERNS[0]).summary().warnings == ()


def test_other_reuse_and_other_solvers_do_not_warn(dit):
    for actions in ({}, {"hidden": PATTERNS[0]}, {"stack_residual": PATTERNS[0]}, {"ff": PATTERNS[0]}):
        plan = sg.make_plan("manual", model=dit, scheduler=ddim("epsilon"), steps=T, actions=actions)
        assert plan.summary().warnings == ()
    for solver in (diffusers.DPMSolverMultistepScheduler(), euler("v_prediction")):
        assert reusing(dit, solver, PATTERNS[0]).summary().warnings == ()


def test_the_warning_names_the_schedule_and_what_to_compare_with(dit):
    (said,) = reusing(dit, ddim("epsilon"), PATTERNS[1]).summary().warnings
    assert "reused at 5 of 8 steps" in said
    assert "on the 3 computed timesteps (875, 750, 375)." in said
    assert "Compare it with DDIMScheduler in 3 steps" in said
    both = sg.make_plan(
        "manual", model=dit, scheduler=flow(), steps=T, actions={"output": PATTERNS[0], "ff": "CCCCRRRR"}
    ).summary()
    assert "what those steps reuse comes on top" in both.warnings[0]
    assert both.as_dict()["warnings"] == both.warnings
    assert f"warning: {both.warnings[0]}" in str(both)


def test_a_plan_that_does_not_record_its_prediction_is_told_what_to_look_for():
    old = json.loads(CachePlan.build(HEADER, SITES, {"output": "CRC"}).to_json())
    del old["prediction"]
    plan = CachePlan.from_json(json.dumps(old))
    assert plan.header == replace(HEADER, prediction="")
    assert "with epsilon or sample (which this plan does not record) prediction" in plan.summary().warnings[0]


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [
        (diffusers.DDIMScheduler(), "epsilon"),
        (diffusers.DDIMScheduler(prediction_type="v_prediction"), "v_prediction"),
        (diffusers.EulerDiscreteScheduler(prediction_type="sample"), "sample"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "flow"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "flow"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_recorded_of_the_prediction(scheduler, prediction):
    assert scheduler_facts(prepare_scheduler(scheduler, 4))["prediction"] == prediction


def test_costs_without_factors_say_what_they_leave_out(dit):
    plan = sg.make_plan("manual", model=dit, scheduler=ddim("epsilon"), steps=2, actions={"ff": "CL"})
    (warning,) = plan.summary().warnings
    assert "LOWRANK counts as a reuse of one value here" in warning
    assert warning in str(plan.summary())
    bound = replace(plan, increments={plan.index(f"transformer_blocks.{b}.ff"): Increment({}, 1, 1, 1) for b in (0, 1)})
    assert bound.summary().warnings == ()
