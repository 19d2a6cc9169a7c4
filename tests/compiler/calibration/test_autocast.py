"""Nothing is measured under autocast: the executable would run in another precision than what was measured."""

import pytest
import torch

import stepgraph as sg
from helpers.tiny import tiny_dit, tiny_scheduler
from stepgraph.errors import CompileError


def calibrate(model, scheduler):
    return sg.calibrate(model, scheduler, steps=2, samples=1)


def measure_covariances(model, scheduler):
    return sg.measure_covariances(model, scheduler, steps=2, samples=1)


def fit_numbers(model, scheduler):
    return sg.make_plan("whole-step", model=model, scheduler=scheduler, steps=4, samples=1)


def train_a_router(model, scheduler):
    settings = sg.RouterSettings(iterations=1, batch=1, pool=1, states="trajectory")
    return sg.train_router(model, scheduler, steps=2, settings=settings)


@pytest.mark.parametrize("measure", [calibrate, measure_covariances, fit_numbers, train_a_router], ids=lambda f: f.__name__)
def test_measuring_is_refused_under_autocast(measure):
    scheduler = tiny_scheduler("ddim")
    scheduler.register_to_config(clip_sample=False)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CompileError, match=r"autocast is on.*leave autocast"):
        measure(tiny_dit(), scheduler)
