"""Nothing is measured under autocast or a mode, which executables run without; nor with labels that have no row."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import stepgraph as sg
from helpers.tiny import NULL_CLASS, inputs, tiny_dit, tiny_scheduler
from stepgraph.compiler.tracing.trace import trace
from stepgraph.errors import ArgumentError, CompileError


def calibrate(model, scheduler):
    return sg.calibrate(model, scheduler, steps=2, samples=1)


def measure_covariances(model, scheduler):
    return sg.measure_covariances(model, scheduler, steps=2, samples=1)


def fit_numbers(model, scheduler):
    return sg.make_plan("whole-step", model=model, scheduler=scheduler, steps=4, samples=1)


def train_a_router(model, scheduler):
    settings = sg.RouterSettings(iterations=1, batch=1, pool=1, states="trajectory")
    return sg.train_router(model, scheduler, steps=2, settings=settings)


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


MEASURE = pytest.mark.parametrize(
    "measure", [calibrate, measure_covariances, fit_numbers, train_a_router], ids=lambda f: f.__name__
)


@MEASURE
@pytest.mark.parametrize("mode", [Doubled, Watched])
def test_measuring_is_refused_in_a_mode(measure, mode):
    scheduler = tiny_scheduler("ddim")
    scheduler.register_to_config(clip_sample=False)
    with mode(), pytest.raises(CompileError, match=f"{mode.__name__} stands around the call"):
        measure(tiny_dit(), scheduler)


def test_a_forward_is_not_traced_in_a_mode():
    model = tiny_dit()
    with Doubled(), pytest.raises(CompileError, match="Doubled stands around"):
        trace(model, inputs(1))


@pytest.mark.parametrize("label", [-1, NULL_CLASS + 1])
def test_labels_without_a_row_are_refused_before_anything_is_measured(label):
    model, scheduler = tiny_dit(), tiny_scheduler("ddim")
    scheduler.register_to_config(clip_sample=False)
    labels = {"class_labels": torch.tensor([label])}
    unconditional = {"class_labels": torch.tensor([1]), "negative_class_labels": torch.tensor([label])}
    states = sg.RouterSettings(iterations=1, batch=1, pool=1, states="q_sample")
    said = rf"class_labels holds {label}; expected whole numbers in 0\.\.{NULL_CLASS}, "
    for measure in (
        lambda: sg.calibrate(model, scheduler, steps=2, samples=1, conditioning=labels),
        lambda: sg.calibrate(model, scheduler, steps=2, samples=1, guidance_scale=2.0, conditioning=unconditional),
        lambda: sg.measure_covariances(model, scheduler, steps=2, samples=1, conditioning=labels),
        lambda: sg.make_plan("whole-step", model=model, scheduler=scheduler, steps=4, samples=1, conditioning=labels),
        lambda: sg.train_router(model, scheduler, steps=2, settings=states, data=torch.zeros(1, 4, 8, 8), conditioning=labels),
    ):
        with pytest.raises(ArgumentError, match=said):
            measure()


@MEASURE
def test_measuring_is_refused_under_autocast(measure):
    scheduler = tiny_scheduler("ddim")
    scheduler.register_to_config(clip_sample=False)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CompileError, match=r"autocast is on.*leave autocast"):
        measure(tiny_dit(), scheduler)
