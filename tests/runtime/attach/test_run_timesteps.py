"""Attached on an accelerator: nothing is read inside a run but at its ends, and wrong timesteps are found all the same.

The CPU is taken for an accelerator here, and reads are refused by name.
"""

from contextlib import nullcontext

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.devices import count_as_accelerator
from helpers.tape import HostReadError, no_host_reads
from helpers.tiny import inputs, tiny_dit
from stepgraph.errors import PlanError
from stepgraph.runtime.attach.run_timesteps import RunTimesteps

STEPS = 4
ACTIONS = {"attn": "CRCR", "ff": "CRRR", "hidden": "CCCR"}
SCHEDULERS = (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler)


@pytest.fixture
def waiting(monkeypatch):
    """Every device is one that would have to be waited for."""
    count_as_accelerator(monkeypatch)


class Pipe:
    """What `attach` needs of a pipeline, with a loop as pipelines have it."""

    def __init__(self, scheduler):
        self.transformer, self.scheduler = tiny_dit(), scheduler

    def run(self, timestep=lambda t, step: t, reads_at=()) -> torch.Tensor:
        """Sample; at the steps that are not in `reads_at`, the transformer must not read anything on the host."""
        self.scheduler.set_timesteps(STEPS)
        latents, conditioning = inputs(2)["hidden_states"], inputs(2)["class_labels"]
        with torch.no_grad():
            for step, t in enumerate(self.scheduler.timesteps):
                scaled, asked = self.scheduler.scale_model_input(latents, t), timestep(t[None].expand(2), step)
                with nullcontext() if step in reads_at else no_host_reads():
                    out = self.transformer(scaled, timestep=asked, class_labels=conditioning).sample
                latents = self.scheduler.step(out.chunk(2, dim=1)[0], t, latents).prev_sample
        return latents


def attached(scheduler, **options) -> Pipe:
    pipe = Pipe(scheduler)
    plan = sg.make_plan("manual", model=pipe.transformer, scheduler=scheduler, steps=STEPS, actions=ACTIONS)
    sg.compile(pipe.transformer, plan, inputs(2), backend="eager", cuda_graphs=False, **options).attach(pipe)
    return pipe


@pytest.mark.parametrize("timestep", [lambda t, step: t, lambda t, step: t.clone() + 0], ids=["view", "computed"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_run_reads_at_its_ends_only(request, kind, timestep):
    pipe = attached(kind())
    wanted = pipe.run(reads_at=range(STEPS))
    with pytest.raises(HostReadError):
        pipe.run()
    request.getfixturevalue("waiting")
    for _ in range(2):
        assert torch.equal(pipe.run(timestep, reads_at=(0, STEPS - 1)), wanted)


def test_a_timestep_out_of_order_is_refused_at_once_where_it_is_the_schedulers(waiting):
    pipe = attached(diffusers.DDIMScheduler(), hoist=False)
    wanted = pipe.run(reads_at=(0, STEPS - 1))

    def wrong(t: torch.Tensor, step: int) -> torch.Tensor:
        return pipe.scheduler.timesteps[3 if step == 1 else step][None].expand(2)

    with pytest.raises(PlanError, match=r"step 1 of the plan is at timestep .*, but the pipeline asks for timestep"):
        pipe.run(wrong, reads_at=(0,))
    assert torch.equal(pipe.run(reads_at=(0, STEPS - 1)), wanted)


def test_a_wrong_timestep_that_is_computed_is_refused_at_the_end(waiting):
    pipe = attached(diffusers.DDIMScheduler(), hoist=False)
    wanted = pipe.run(reads_at=(0, STEPS - 1))
    visited = []

    def wrong(t: torch.Tensor, step: int) -> torch.Tensor:
        visited.append(step)
        return t + (step == 2)

    with pytest.raises(PlanError, match=r"asked for other timesteps than the plan's in this run.*Found at the end"):
        pipe.run(wrong, reads_at=(0, STEPS - 1))
    assert visited == list(range(STEPS))
    # One of several samples is enough; a run that is given up leaves nothing behind.
    with pytest.raises(PlanError, match="Found at the end"):
        pipe.run(lambda t, step: t + torch.tensor([0, step == 1]), reads_at=(0, STEPS - 1))
    with pytest.raises(ZeroDivisionError):
        pipe.run(lambda t, step: t + 7 * step if step < 2 else 1 / 0, reads_at=(0,))
    assert torch.equal(pipe.run(reads_at=(0, STEPS - 1)), wanted)


def test_the_first_timestep_is_read(waiting):
    pipe = attached(diffusers.DDIMScheduler())
    with pytest.raises(PlanError, match="the plan begins at timestep"):
        pipe.run(lambda t, step: t - 1, reads_at=(0,))


def test_views_of_a_schedule_say_which_they_are():
    whole = torch.arange(10.0).flip(0)
    schedule = RunTimesteps(whole[2:])
    assert [schedule.value(t) for t in whole[2:]] == list(range(7, -1, -1))
    assert schedule.value(whole[4][None].expand(3)) == 5.0
    # Not an entry of it: what lies before, several of it, a copy, other storage.
    for other in (whole[0], whole[2:4], whole[2:4].clone(), whole[4] + 0, whole[4].view(torch.int32)):
        assert schedule.value(other) is None
    strided = RunTimesteps(whole[::2])
    assert [strided.value(t) for t in whole[:4]] == [9.0, None, 7.0, None]
    whole[4] = 3.0
    assert schedule.value(whole[4]) is None
