"""A model is traced once per signature in a chain of calls, and its graphs belong to that chain and that model alone."""

import inspect
import sys

import diffusers
import pytest
import torch
from typer.testing import CliRunner

import stepgraph as sg
from helpers.pipes import images
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.cli import factors as factors_cli
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.models import family_of
from stepgraph.compiler.tracing import trace as trace_file

pytestmark = pytest.mark.traces


@pytest.fixture
def runs(monkeypatch):
    """(Model, batch) of every run of a forward on traced tensors; each trace is two, the second of which checks the first."""
    seen = []
    run = trace_file._run

    def counted(model, example, *rest):
        seen.append((model, example["hidden_states"].shape[0]))
        return run(model, example, *rest)

    monkeypatch.setattr(trace_file, "_run", counted)
    return seen


@pytest.fixture
def families(monkeypatch):
    """Models whose family was asked for, by whichever module."""
    seen = []

    def counted(model):
        seen.append(model)
        return family_of(model)

    importers = [m for name, m in sys.modules.items() if name.startswith("stepgraph") and vars(m).get("family_of") is family_of]
    assert len(importers) > 2
    for module in importers:
        monkeypatch.setattr(module, "family_of", counted)
    return seen


def accelerated(pipe, policy, **arguments):
    exe = sg.accelerate(pipe, 4, policy, backend="eager", exact=True, **arguments)
    images(pipe)
    exe.detach()
    return exe


def test_accelerate_traces_once(pipe, runs, families):
    accelerated(pipe, "interval", every=2)
    # Two rows of the model's input for all of it, seen twice each.
    assert [batch for _, batch in runs] == [2, 2]
    assert families == [pipe.transformer]


def test_a_calibration_with_guidance_shares_the_compilers_graph(pipe, runs, families):
    accelerated(pipe, "smoothcache", alpha=0.4, samples=1, guidance_scale=2.0)
    assert [batch for _, batch in runs] == [2, 2]
    assert families == [pipe.transformer]


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ddim: sg.calibrate(model, ddim, steps=2, samples=1),
        lambda model, ddim: sg.make_plan("full", model=model, scheduler=ddim, steps=2),
        lambda model, ddim: sg.measure_covariances(model, ddim, steps=2, samples=1),
        lambda model, ddim: sg.train_router(
            model, ddim, steps=2, settings=sg.RouterSettings(iterations=1, pool=1, batch=1, label_dropout=0.0)
        ),
    ],
)  # fmt: skip
def test_a_family_is_asked_for_once(dit, families, call):
    call(dit, diffusers.DDIMScheduler(clip_sample=False))
    assert families == [dit]


def test_factors_are_made_on_the_graph_that_they_are_measured_with(dit, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(factors_cli, "load_model", lambda *_: dit)
    monkeypatch.setattr(factors_cli, "load_scheduler", lambda *_: diffusers.DDIMScheduler(clip_sample=False))
    command = ["make", "tiny", "--steps", "3", "--samples", "1", "--rank", "2", "-o", str(tmp_path / "f.safetensors")]
    result = CliRunner().invoke(factors_cli.factors_app, command)
    assert result.exit_code == 0, result.output
    assert [batch for _, batch in runs] == [1, 1]


def test_a_calibration_without_guidance_has_one_row_of_its_own(pipe, runs):
    accelerated(pipe, "invardiff", step=0.0, attn=0.9, ff=0.9, samples=1)
    # Phase 2 measures with the graph that phase 1 was measured with.
    assert sorted(batch for _, batch in runs) == [1, 1, 2, 2]


def test_a_sweep_traces_once_per_signature(dit, runs):
    sg.sweep(
        "interval", model=dit, scheduler=tiny_scheduler("ddim"), knob="every", values=[1, 2, 3], steps=3, samples=2, batch=2,
    )  # fmt: skip
    assert sorted(batch for _, batch in runs) == [1, 1, 2, 2]


def test_fits_share_one_graph(dit, runs):
    ddim = diffusers.DDIMScheduler(clip_sample=False)
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=4, every=2, kinds=["output"])
    runs.clear()
    sg.fit_whole_step(plan, dit, ddim, samples=2)
    assert [batch for _, batch in runs] == [2, 2]


def test_users_hand_on_no_graphs():
    functions = [getattr(sg, name) for name in sg.__all__ if inspect.isfunction(getattr(sg, name))]
    assert len(functions) > 10
    assert not [f.__name__ for f in functions if "traced" in inspect.signature(f).parameters]


def test_nothing_is_shared_between_models_or_chains(dit, runs):
    other, traced = tiny_dit(seed=1), TracedModel(dit)
    assert TracedModel.of(dit, traced) is traced
    assert TracedModel.of(other, traced).model is other
    assert traced.marked(inputs()) is traced.marked(inputs())
    assert len(runs) == 2
    sg.compile(dit, sg.make_plan("full", model=dit, scheduler=tiny_scheduler("ddim"), steps=1), inputs(), backend="eager")
    assert len(runs) == 6


def test_another_batch_size_is_traced_when_it_is_met(pipe, runs):
    """Later graphs are those of the model as it is then, not of the chain that compiled it."""
    exe = sg.accelerate(pipe, 4, "interval", backend="eager", exact=True, every=2)
    runs.clear()
    pipe(class_labels=[1, 2], num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(0))
    exe.detach()
    assert [batch for _, batch in runs] == [4, 4]


def test_without_inputs_any_example_graph_serves(dit, runs):
    traced = TracedModel(dit)
    two = traced.marked(sg.example_inputs(dit, 2))
    assert traced.marked() is two
    larger = diffusers.DiTTransformer2DModel.from_config(dict(dit.config) | {"sample_size": 12}).eval()
    traced = TracedModel(larger)
    odd = traced.marked({**sg.example_inputs(larger, 2), "hidden_states": torch.zeros(2, 4, 8, 8)})
    # A graph of other shapes per sample does not.
    assert traced.marked() is not odd
