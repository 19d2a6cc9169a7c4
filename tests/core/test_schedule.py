"""What a schedule is made of, against diffusers' own pipelines."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st

from helpers.text_pipes import DYNAMIC
from stepgraph.errors import ArgumentError, PlanError
from stepgraph.schedule import Schedule, TimestepInput, counted_steps, image_shift, image_tokens, schedule_of
from stepgraph.scheduler import prepare_scheduler


@given(st.integers(1, 20000), st.floats(0.1, 1.0), st.floats(1.0, 2.0))
def test_the_shift_is_that_of_flux_s_pipeline(tokens, least, most):
    config = {**DYNAMIC, "base_shift": least, "max_shift": most}
    assert image_shift(tokens, config) == calculate_shift(tokens, 256, 4096, least, most)
    assert image_shift(tokens, {}) == calculate_shift(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_timestep_has_the_bits_that_flux_s_pipeline_makes(dtype):
    timesteps = torch.linspace(1000, 1, 977)
    given = TimestepInput(("cast", "/1000"))(timesteps, dtype)
    for t, value in zip(timesteps, given, strict=True):
        # As the pipeline writes it.
        expected = t.expand(2).to(dtype) / 1000
        assert torch.equal(value.expand(2), expected)


def test_other_makes_of_timesteps():
    t = torch.tensor([999.0, 250.0])
    assert torch.equal(TimestepInput()(t, torch.bfloat16), t)
    assert torch.equal(TimestepInput(("1000-", "/1000"))(t, t.dtype), (1000 - t) / 1000)
    assert torch.equal(TimestepInput(("/1000", "cast"))(t, torch.bfloat16), (t / 1000).to(torch.bfloat16))
    assert torch.equal(TimestepInput(("*0.001", "1-"))(t, t.dtype), 1 - t * 0.001)
    assert TimestepInput(("cast", "/1000")).unit == 1e-3
    for wrong in ("double", "/0", "/-1", "-1", 7, "", "1"):
        with pytest.raises(PlanError, match="the timestep's operation"):
            TimestepInput((wrong,))


# (what is asked for, steps, what comes out or the error)
ASKED = [
    (None, 8, (Schedule(), 8)),
    ({"strength": 0.5}, 8, (Schedule(begin=4), 8)),
    ({"strength": 1.0}, 8, (Schedule(), 8)),
    ({"sigmas": np.linspace(1, 0.5, 2)}, None, (Schedule(sigmas=(1.0, 0.5)), 2)),
    ({"sigmas": torch.tensor([1.0, 0.5]), "strength": 0.5}, None, (Schedule(sigmas=(1.0, 0.5), begin=1), 2)),
    ({"timesteps": [900, 100]}, 2, (Schedule(timesteps=(900.0, 100.0)), 2)),
    ({"mu": 1}, 8, (Schedule(mu=1), 8)),
    ({"sigmas": [1.0]}, 2, "steps is 2, but 1 sigmas are given"),
    ({"sigmas": []}, 2, "sigmas is"),
    ({"sigmas": [1.0, float("nan")]}, None, "finite"),
    ({"sigmas": "high"}, None, "sigmas is 'high'"),
    ({"sigmas": [1.0], "timesteps": [9]}, None, "takes one of them"),
    ({"strength": 0.0}, 8, "leaves none of the 8 steps"),
    ({"strength": 1.5}, 8, "strength is 1.5"),
    ({"strength": 0.5, "begin": 2}, 8, "no begin beside it"),
    ({"begin": -1}, 8, "begin is -1"),
    ({"sigma": [1.0]}, 8, "schedule has no 'sigma'; it takes sigmas, timesteps, mu, begin, strength"),
    ([1.0], 8, "expected a mapping"),
    (None, None, "expected the number of inference steps"),
]


@pytest.mark.parametrize(("wish", "steps", "expected"), ASKED)
def test_what_is_asked_for(wish, steps, expected):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    if isinstance(expected, tuple):
        assert counted_steps(wish, steps, scheduler) == expected
        return
    with pytest.raises(ArgumentError, match=expected):
        counted_steps(wish, steps, scheduler)


def test_a_strength_begins_where_pipelines_do():
    pipe = diffusers.FluxImg2ImgPipeline.__new__(diffusers.FluxImg2ImgPipeline)
    for kind in (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.HeunDiscreteScheduler):
        for steps in (1, 7, 10, 50):
            for strength in (0.05, 0.3, 0.55, 0.99, 1.0):
                scheduler = kind()
                scheduler.set_timesteps(steps)
                object.__setattr__(pipe, "scheduler", scheduler)
                if int(max(steps - min(steps * strength, steps), 0)) == steps:
                    continue
                timesteps, _ = pipe.get_timesteps(steps, strength, "cpu")
                begin = schedule_of({"strength": strength}, steps, scheduler.order)[0].begin
                assert torch.equal(scheduler.timesteps[begin:], timesteps)


REFUSED = {
    "no sigmas": (diffusers.DDIMScheduler, {}, {"sigmas": [1.0, 0.5]}, "DDIMScheduler takes no sigmas in set_timesteps"),
    "no timesteps": (diffusers.DDIMScheduler, {}, {"timesteps": [900, 5]}, "takes no timesteps"),
    "no mu": (diffusers.DDIMScheduler, {}, {"mu": 1.0}, "takes no mu"),
    "a shift without mu": (
        diffusers.FlowMatchEulerDiscreteScheduler, DYNAMIC, None, r"use_dynamic_shifting\); pass schedule=\{'mu'"
    ),
    "what the scheduler refuses": (
        diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, {"timesteps": [900, 5]}, "cannot be set to 2 steps"
    ),
    "nothing left": (diffusers.DDIMScheduler, {}, {"begin": 2}, "the run begins at evaluation 2, but DDIMScheduler has 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_scheduler_does_not_take_is_refused(case):
    kind, config, wish, message = REFUSED[case]
    with pytest.raises(PlanError, match=message):
        prepare_scheduler(kind(**config), 2, schedule=schedule_of(wish, 2)[0])


def test_a_scheduler_is_set_as_pipelines_set_it():
    scheduler, sigmas = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC), [1.0, 0.75, 0.5, 0.25]
    prepared = prepare_scheduler(scheduler, 4, schedule=Schedule(sigmas=tuple(sigmas), mu=0.9, begin=2))
    scheduler.set_timesteps(sigmas=np.array(sigmas), mu=0.9)
    assert torch.equal(prepared.timesteps, scheduler.timesteps)
    assert prepared.begin_index == 2
    euler = prepare_scheduler(diffusers.EulerDiscreteScheduler(), 3, schedule=Schedule(timesteps=(900.0, 500.0, 20.0)))
    assert euler.timesteps.tolist() == [900, 500, 20]


def test_image_tokens_and_shorter_schedules():
    assert image_tokens((4096, 64), {}) == 4096
    assert image_tokens((16, 128, 96), {"patch_size": 2}) == 64 * 48
    assert image_tokens((16, 8), {}) == 16
    assert image_tokens((4, 8, 8), {}) is None
    assert Schedule(sigmas=(1.0, 0.75, 0.5)).shorter(2).sigmas == (1.0, 0.5)
    assert Schedule(mu=1.0).shorter(2) == Schedule(mu=1.0)
