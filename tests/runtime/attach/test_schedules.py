"""Real FLUX and SD3 pipelines, whose schedules are their own: sigmas, a shift of the image's size, image to image."""

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.oracle_families import FluxOracle, SD3Oracle
from helpers.text_pipes import TEXT, flux_example, flux_pipe, latents, sd3_example, sd3_pipe

STEPS = 4
SIGMAS = [1.0, 0.7, 0.4, 0.1]


def attached(pipe, policy: str = "full", steps: int = STEPS, **arguments) -> sg.Executable:
    example = sd3_example() if "SD3" in type(pipe.transformer).__name__ else flux_example(pipe)
    plan = sg.make_plan(
        policy,
        model=pipe.transformer,
        scheduler=pipe.scheduler,
        steps=steps,
        guidance="none",
        example_inputs=example,
        **arguments,
    )
    return sg.compile(pipe.transformer, plan, example, backend="eager", exact=True).attach(pipe)


# What is made, and the calls whose latents are the eager pipeline's, bit for bit.
CALLS = {
    "flux": (flux_pipe, STEPS, [{}, {"side": 12}, {"text": 9}, {"sigmas": SIGMAS}, {}]),
    "flux in bfloat16": (lambda: flux_pipe(dtype=torch.bfloat16), STEPS, [{}]),
    "flux, image to image": (
        lambda: flux_pipe(diffusers.FluxImg2ImgPipeline), 6, [{"strength": 0.5}, {"strength": 0.9}, {"strength": 0.5}]
    ),
    "sd3": (sd3_pipe, STEPS, [{}, {"guidance_scale": 4.0}, {"sigmas": SIGMAS}]),
    "sd3, image to image": (
        lambda: sd3_pipe(diffusers.StableDiffusion3Img2ImgPipeline), 6,
        [{"strength": 0.5}, {"strength": 0.5, "guidance_scale": 4.0}, {"strength": 1.0}],
    ),
    "sd3 under euler's scheduler": (
        lambda: sd3_pipe(scheduler=diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)), STEPS, [{}]
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CALLS)
def test_an_all_compute_plan_gives_the_eager_latents(case):
    make, steps, calls = CALLS[case]
    pipe = make()
    eager = [latents(pipe, seed, num_inference_steps=steps, **call) for seed, call in enumerate(calls)]
    attached(pipe, steps=steps)
    for seed, (call, expected) in enumerate(zip(calls, eager, strict=True)):
        assert torch.equal(latents(pipe, seed, num_inference_steps=steps, **call), expected), call
    assert not torch.equal(eager[0], eager[-1]) or len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_an_interval_plan_gives_the_oracle_s_latents_from_any_beginning(kind, caplog):
    make, image, oracle = {
        "flux": (flux_pipe, diffusers.FluxImg2ImgPipeline, FluxOracle),
        "sd3": (sd3_pipe, diffusers.StableDiffusion3Img2ImgPipeline, SD3Oracle),
    }[kind]
    pipe = make(image)
    exe = attached(pipe, "interval", steps=8, every=3)
    exe.detach()
    # Of 8 steps the last 4: rows C R C R of a plan with C at 0, 3 and 6, of which the first computes everything.
    wanted = {}
    for strength, begin in ((1.0, 0), (0.5, 4)):
        rows = list(exe.plan.rows[begin:])
        rows[0] = "C" * len(exe.plan.sites)
        assert exe.plan.tail(begin).rows == tuple(rows)
        with oracle.of(pipe.transformer, exe.plan.tail(begin)).in_place_of_model():
            wanted[strength] = latents(pipe, num_inference_steps=8, strength=strength)
    eager = latents(pipe, num_inference_steps=8, strength=0.5)
    exe.attach(pipe)
    with caplog.at_level("WARNING", logger="stepgraph"):
        for strength in (0.5, 1.0, 0.5):
            assert torch.equal(latents(pipe, num_inference_steps=8, strength=strength), wanted[strength]), strength
    assert caplog.text.count("compiled for runs that begin at step 4 of 8") == 1
    assert not torch.equal(wanted[0.5], eager)


@pytest.mark.slow
def test_a_calibrated_plan_is_measured_with_the_pipeline_s_schedule_and_refuses_others(tmp_path):
    pipe = flux_pipe()
    eager = latents(pipe, num_inference_steps=STEPS)
    timesteps = pipe.scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(1)
    given = {
        "encoder_hidden_states": torch.randn(2, TEXT, 12, generator=generator),
        "pooled_projections": torch.randn(2, 10, generator=generator),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(TEXT, 3), "guidance": torch.ones(2),
    }  # fmt: skip
    more = {"alpha": 1e-9, "samples": 2, "conditioning": given, "backend": "eager", "exact": True, "cache": tmp_path}
    exe = sg.accelerate(pipe, STEPS, "smoothcache", batch=1, **more)
    assert exe.plan.header.timesteps == pytest.approx(timesteps)
    assert set("".join(exe.plan.rows)) == {"C"}
    assert torch.equal(latents(pipe, num_inference_steps=STEPS), eager)
    with pytest.raises(sg.PlanError, match=r"compiled for timestep .* schedule=\{'sigmas'.*the plan's timesteps are 1000, "):
        latents(pipe, num_inference_steps=STEPS, sigmas=SIGMAS)
    with pytest.raises(sg.PlanError, match="make a plan for this number of tokens"):
        latents(pipe, num_inference_steps=STEPS, text=9)
    with pytest.raises(sg.PlanError, match="compiled for timestep"):
        # The shift is the image's.
        latents(pipe, num_inference_steps=STEPS, side=12)
    exe.detach()
    exe = sg.accelerate(pipe, None, "smoothcache", batch=1, schedule={"sigmas": SIGMAS}, **more)
    assert exe.plan.header.schedule.sigmas == tuple(SIGMAS)
    latents(pipe, num_inference_steps=STEPS, sigmas=SIGMAS)
    exe.detach()


def test_a_timestep_of_the_wrong_unit_is_refused():
    pipe = flux_pipe()
    attached(pipe)
    pipe.scheduler.set_timesteps(STEPS, mu=0.5)
    with pytest.raises(sg.PlanError, match="the plan begins at timestep 1, but the pipeline's first call asks for 1000"):
        pipe.transformer(**{**flux_example(pipe), "timestep": pipe.scheduler.timesteps[:1]})
