"""Sampling with the schedules that pipelines set: the pipelines' latents, from an executable, a model and an export."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

import stepgraph as sg
from helpers.oracle import Oracle
from helpers.text_pipes import DYNAMIC, TEXT, flux_example, flux_pipe
from helpers.tiny import inputs, labels, tiny_dit, tiny_scheduler
from stepgraph.runtime.export.runner import Runner

STEPS = 4
LINE = {"sigmas": np.linspace(1.0, 1 / STEPS, STEPS)}


def prompt(dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder_hidden_states": torch.randn(1, TEXT, 12, generator=generator).to(dtype),
        "pooled_projections": torch.randn(1, 10, generator=generator).to(dtype),
    }  # fmt: skip


def flux_conditioning(pipe) -> dict[str, torch.Tensor]:
    """What the pipeline gives its transformer beside these."""
    dtype = pipe.transformer.dtype
    ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", dtype)
    return {**prompt(dtype), "img_ids": ids, "txt_ids": torch.zeros(TEXT, 3, dtype=dtype), "guidance": torch.full((1,), 3.5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux_s_latents_are_those_of_its_pipeline(dtype, tmp_path):
    pipe = flux_pipe(dtype=dtype)
    noise = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
    words = {
        "prompt_embeds": prompt(dtype)["encoder_hidden_states"],
        "pooled_prompt_embeds": prompt(dtype)["pooled_projections"],
    }
    wanted = pipe(
        **words, latents=noise, height=8, width=8, num_inference_steps=STEPS, guidance_scale=3.5, output_type="latent"
    ).images
    given, model, scheduler = flux_conditioning(pipe), pipe.transformer, pipe.scheduler
    assert torch.equal(sg.sample(model, scheduler, noise, steps=STEPS, schedule=LINE, **given), wanted)
    example = flux_example(pipe)
    plan = sg.make_plan("full", model=model, scheduler=scheduler, schedule=LINE, guidance="none", example_inputs=example)
    assert plan.header.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    assert plan.header.schedule.mu == calculate_shift(16)
    assert plan.header.timestep.operations == ("cast", "/1000")
    exe = sg.compile(model, plan, example, backend="eager", exact=True)
    assert torch.equal(sg.sample(exe, scheduler, noise, **given), wanted)
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    fast = sg.compile(model, plan, example, backend="eager")
    torch.testing.assert_close(sg.sample(fast, scheduler, noise, **given), wanted, **close)
    if dtype == torch.float32:
        fast.export(tmp_path / "deploy", scheduler=scheduler)
        runner = Runner(tmp_path / "deploy")
        torch.testing.assert_close(runner.sample(noise, **given), wanted, **close)


def test_tables_of_all_steps_are_made_at_once_for_what_pipelines_give():
    pipe = flux_pipe(dtype=torch.bfloat16)
    example, scheduler = flux_example(pipe), pipe.scheduler
    plan = sg.make_plan(
        "full", model=pipe.transformer, scheduler=scheduler, schedule=LINE, guidance="none", example_inputs=example
    )
    session = sg.compile(pipe.transformer, plan, example, backend="eager").session()
    scheduler.set_timesteps(**LINE, mu=calculate_shift(16))
    for t in scheduler.timesteps:
        session(**{**example, "timestep": t.expand(1).to(torch.bfloat16) / 1000})
        assert session.tables[0].batched


def test_a_full_plan_takes_over_a_schedule_and_a_calibrated_one_refuses_it():
    model, scheduler = tiny_dit(), diffusers.EulerDiscreteScheduler()
    noise, wish = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), {"timesteps": [900, 500, 200, 10]}
    full = sg.make_plan("full", model=model, scheduler=scheduler, steps=STEPS)
    exe = sg.compile(model, full, inputs(1), backend="eager", exact=True)
    wanted = sg.sample(model, scheduler, noise, steps=STEPS, schedule=wish, **labels(1))
    assert torch.equal(sg.sample(exe, scheduler, noise, schedule=wish, **labels(1)), wanted)
    assert not torch.equal(sg.sample(exe, scheduler, noise, **labels(1)), wanted)
    stats = sg.calibrate(model, scheduler, samples=2, schedule=wish)
    assert stats.header.timesteps == (900, 500, 200, 10)
    measured = sg.compile(model, sg.make_plan("smoothcache", stats, alpha=1e-9), inputs(1), backend="eager", exact=True)
    assert torch.equal(sg.sample(measured, scheduler, noise, **labels(1)), wanted)
    with pytest.raises(sg.PlanError, match="compiled for timestep 900 at step 0, but the scheduler of this call has 999"):
        sg.sample(measured, scheduler, noise, schedule={"timesteps": [999, 500, 200, 10]}, **labels(1))
    with pytest.raises(sg.PlanError, match="compiled for timestep 900 at step 0, but the given scheduler has 999"):
        sg.make_plan("smoothcache", stats, scheduler=scheduler, schedule={"timesteps": [999, 500, 200, 10]}, alpha=1.0)


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "heun"])
def test_a_run_that_begins_later(name):
    """Against the loop of image-to-image pipelines."""
    model, scheduler, image = (
        tiny_dit(),
        tiny_scheduler(name),
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    plan = sg.make_plan("interval", model=model, scheduler=scheduler, steps=6, every=2)
    exe = sg.compile(model, plan, inputs(1), backend="eager", exact=True)
    scheduler.set_timesteps(6)
    begin = 3 * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    oracle, latents = Oracle.of(model, plan.tail(begin)), image
    for t in scheduler.timesteps[begin:]:
        scaled = scheduler.scale_model_input(latents, t)
        with torch.no_grad():
            output = oracle(scaled, timestep=t.expand(1), **labels(1)).sample[:, :4]
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    assert torch.equal(sg.sample(exe, scheduler, image, schedule={"strength": 0.5}, **labels(1)), latents)
    own = sg.make_plan("full", model=model, scheduler=scheduler, steps=6, schedule={"strength": 0.5})
    assert own.steps == plan.steps - begin
    alone = sg.compile(model, own, inputs(1), backend="eager")
    eager = sg.sample(model, scheduler, image, steps=6, schedule={"begin": begin}, **labels(1))
    torch.testing.assert_close(sg.sample(alone, scheduler, image, **labels(1)), eager, rtol=1e-3, atol=1e-4)
    with pytest.raises(sg.PlanError, match=f"the plan's run begins at evaluation {begin}, asked for is {begin - 1}"):
        sg.sample(alone, scheduler, image, schedule={"begin": begin - 1}, **labels(1))


def test_programs_of_the_last_beginnings_are_kept():
    model, scheduler = tiny_dit(), tiny_scheduler("ddim")
    plan = sg.make_plan("interval", model=model, scheduler=scheduler, steps=12, every=2, kinds=["ff"])
    exe = sg.compile(model, plan, inputs(1), backend="eager", exact=True)
    image = torch.randn(1, 4, 8, 8)
    for begin in range(1, 11):
        sg.sample(exe, scheduler, image, schedule={"begin": begin}, **labels(1))
    assert sorted({program.begin for program in exe._programs.values()}) == [0, *range(3, 11)]


def test_a_plan_without_the_records_means_what_the_family_does():
    pipe = flux_pipe()
    example = flux_example(pipe)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    plan = sg.make_plan("full", model=pipe.transformer, scheduler=flow, steps=2, guidance="none", example_inputs=example)
    lines = [line for line in plan.to_json().split("\n") if not line.startswith(('  "schedule"', '  "timestep"'))]
    old = sg.CachePlan.from_json("\n".join(lines))
    assert old.header.timestep is None
    exe = sg.compile(pipe.transformer, old, example, backend="eager", exact=True)
    assert exe.plan.header.timestep == plan.header.timestep


def test_a_shift_follows_the_image_where_nothing_was_measured():
    pipe = flux_pipe()
    model, scheduler, example = pipe.transformer, diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC), flux_example(pipe)
    plan = sg.make_plan("full", model=model, scheduler=scheduler, steps=2, guidance="none", example_inputs=example)
    given = {**flux_conditioning(pipe), "img_ids": torch.zeros(36, 3)}
    noise = torch.randn(1, 36, 4, generator=torch.Generator().manual_seed(0))
    exe = sg.compile(model, plan, example, backend="eager", exact=True)
    wanted = sg.sample(model, scheduler, noise, steps=2, schedule={"mu": calculate_shift(36)}, **given)
    assert torch.equal(sg.sample(exe, scheduler, noise, **given), wanted)
    fixed = {"mu": 0.9}
    explicit = sg.make_plan(
        "full", model=model, scheduler=scheduler, steps=2, guidance="none", example_inputs=example, schedule=fixed
    )
    exe = sg.compile(model, explicit, example, backend="eager", exact=True)
    wanted = sg.sample(model, scheduler, noise, steps=2, schedule=fixed, **given)
    assert torch.equal(sg.sample(exe, scheduler, noise, **given), wanted)
