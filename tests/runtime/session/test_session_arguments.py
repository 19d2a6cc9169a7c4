"""What a session is made with fits its plan, or is refused before the first step."""

import math

import pytest

import stepgraph as sg
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.errors import MismatchError, PlanError

STEPS = 3


@pytest.fixture(scope="module")
def scheduler():
    scheduler = tiny_scheduler("ddim")
    scheduler.register_to_config(clip_sample=False)
    return scheduler


@pytest.fixture(scope="module")
def executable(scheduler):
    model = tiny_dit()
    plan = sg.make_plan("full", model=model, scheduler=scheduler, steps=STEPS)
    return sg.compile(model, plan, inputs(1), backend="eager")


WRONG = {
    "timesteps are 2; expected 3": {"timesteps": [2.0, 1.0]},
    "timesteps are 4; expected 3": {"timesteps": [4.0, 3.0, 2.0, 1.0]},
    "timesteps are 3; expected 2": {"timesteps": [3.0, 2.0, 1.0], "begin": 1},
    r"timesteps\[1\] is nan; expected a number": {"timesteps": [3.0, math.nan, 1.0]},
    r"timesteps\[0\] is inf": {"timesteps": [math.inf, 2.0, 1.0]},
    "begin is 3; expected a whole number in 0..2": {"begin": STEPS},
    "begin is -1; expected": {"begin": -1},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_session_is_refused_when_it_is_made(executable, said):
    with pytest.raises(PlanError, match=said):
        executable.session(**WRONG[said])


def test_a_forecast_that_reads_what_a_later_beginning_does_not_have_is_refused_at_once(scheduler):
    model = tiny_dit()
    plan = sg.make_plan("manual", model=model, scheduler=scheduler, steps=6, actions={"attn": "CRCRCR"})
    executable = sg.compile(model, sg.forecast(plan), inputs(1), backend="eager")
    executable.session(begin=4)
    with pytest.raises(PlanError, match="the forecast's coefficients are for values of the steps"):
        executable.session(begin=2)


@pytest.mark.parametrize("begin", range(STEPS))
def test_a_run_has_one_step_for_each_timestep(executable, begin):
    run = executable.session(begin=begin, timesteps=[float(t) for t in range(STEPS - begin, 0, -1)])
    for step in range(STEPS - begin):
        assert (run.step, run.finished) == (step, False)
        run(**inputs(1, timestep=STEPS - begin - step))
    assert run.finished


def test_other_timesteps_are_taken_warned_of_or_refused_as_the_plan_was_made(scheduler, caplog):
    model = tiny_dit()
    full = sg.make_plan("full", model=model, scheduler=scheduler, steps=STEPS)
    forecast = sg.forecast(sg.make_plan("manual", model=model, scheduler=scheduler, steps=4, actions={"attn": "CCRR"}))
    chosen, others = full.with_header(measured="choice"), [float(t) + 5 for t in full.header.timesteps]

    def compiled(plan, **options):
        return sg.compile(model, plan, inputs(1), backend="eager", **options)

    with caplog.at_level("WARNING", logger="stepgraph"):
        compiled(full, strict=True).session(timesteps=others)
        for plan in (chosen, forecast):
            compiled(plan, strict=True).session(timesteps=plan.header.timesteps)
        assert not caplog.records
        lenient = compiled(chosen)
        for _ in range(2):
            assert lenient.session(timesteps=others).timesteps == tuple(others)
    (said,) = (record.getMessage() for record in caplog.records)
    planned = full.header.timesteps[0]
    assert f"compiled for timestep {planned:g} at step 0, but the run has {planned + 5:g} there; the plan goes on" in said
    with pytest.raises(MismatchError, match="strict=True refuses others"):
        compiled(chosen, strict=True).session(timesteps=others)
    with pytest.raises(MismatchError, match=r"at step 1, .*coefficients"):
        compiled(forecast).session(timesteps=[forecast.header.timesteps[0], 3.0, 2.0, 1.0])
