"""Routers of FLUX: conditioned on what is given, under the pipeline's schedule, with its timesteps and positions of tokens."""

from dataclasses import replace

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.families import flux_inputs
from helpers.five_models import flux
from helpers.routers import SMALL, train
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.routers.router import Router
from stepgraph.compiler.routers.router_states import Conditioning, Sampling, Trajectories
from stepgraph.errors import PlanError
from stepgraph.inputs import POSITIONS
from stepgraph.plan import canonical
from stepgraph.schedule import Schedule, TimestepInput, timestep_of

SIGMAS = (1.0, 0.8, 0.5, 0.2)
POOL = 6
FEW = replace(SMALL, iterations=2, pool=POOL)


@pytest.fixture(scope="module")
def model():
    return flux()


@pytest.fixture(scope="module")
def scheduler():
    return diffusers.FlowMatchEulerDiscreteScheduler()


def conditioning(rows: int = POOL, unconditional: bool = True) -> dict[str, torch.Tensor]:
    """Text of every sample, zeros for none, and positions that both share."""
    given = {name: value for name, value in flux_inputs(rows).items() if name not in ("hidden_states", "timestep")}
    text = ("encoder_hidden_states", "pooled_projections", "guidance")
    return given | ({f"negative_{name}": torch.zeros_like(given[name]) for name in text} if unconditional else {})


@pytest.fixture(scope="module")
def router(model, scheduler) -> Router:
    return train(model, scheduler, settings=FEW, conditioning=conditioning(), schedule={"sigmas": SIGMAS})


def states(model, scheduler, dropout: float, convert: TimestepInput | None = None) -> Trajectories:
    example = sg.example_inputs(model, 1, conditioning())
    how = Sampling(TracedModel(model), scheduler, 4, example, Schedule(SIGMAS), convert or timestep_of(model))
    pool = Conditioning.of_pool(how, conditioning(), POOL, dropout)
    return Trajectories(how, pool, POOL, 4, dropout, torch.Generator().manual_seed(0))


def test_the_states_are_those_of_the_pipelines_loop(model, scheduler):
    window = states(model, scheduler, 0.0).window(torch.tensor([0, 2]), 1, torch.Generator().manual_seed(0))
    first, second = window.inputs
    assert first["timestep"].tolist() == pytest.approx([1.0, 0.5])
    assert second["timestep"].tolist() == pytest.approx([0.8, 0.2])
    assert all(torch.equal(first[name], flux_inputs()[name]) for name in POSITIONS)
    with torch.no_grad():
        predicted, expected = model(**first)[0], model(**second)[0]
    slopes = torch.tensor([0.8 - 1.0, 0.2 - 0.5]).reshape(2, 1, 1)
    torch.testing.assert_close(second["hidden_states"], first["hidden_states"] + slopes * predicted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(window.targets[0], expected, rtol=1e-4, atol=1e-5)


def test_dropped_text_is_the_unconditional_one_that_is_given(model, scheduler):
    kept = states(model, scheduler, 0.5).conditioning.wanted
    given, dropped = conditioning(), 0
    for row in range(POOL):
        nothing = not kept["encoder_hidden_states"][row].any()
        dropped += nothing
        for name in ("encoder_hidden_states", "pooled_projections", "guidance"):
            assert torch.equal(kept[name][row], torch.zeros_like(given[name][row]) if nothing else given[name][row])
    assert 0 < dropped < POOL


def test_what_the_pipeline_makes_of_the_timestep_can_be_said(model, scheduler):
    window = states(model, scheduler, 0.0, TimestepInput(("cast", "/500"))).window(
        torch.tensor([0]), 1, torch.Generator().manual_seed(0)
    )
    assert [float(inputs["timestep"]) for inputs in window.inputs] == pytest.approx([2.0, 1.6])


def rows(plan: sg.CachePlan, router: Router, theta: float) -> tuple[str, ...]:
    """What the routers reuse, as plans have it: what nobody reads is neither."""
    columns = {site.name: column for column, site in enumerate(router.sites)}
    wanted = [
        "".join("R" if site.name in columns and step[columns[site.name]] else "C" for site in plan.sites)
        for step in router.reused(theta).tolist()
    ]
    return tuple(canonical(plan.sites, row) for row in wanted)


def test_a_plan_of_the_routers_is_for_the_same_schedule(model, scheduler, router, tmp_path):
    assert router.header.timesteps == pytest.approx([1000 * sigma for sigma in SIGMAS])
    assert [bool(row.any()) for row in router.logits] == [False, True, False, True]
    router.save(tmp_path / "router.safetensors")
    example = sg.example_inputs(model, 1, conditioning())
    options = {"model": model, "scheduler": scheduler, "steps": 4, "router": str(tmp_path / "router.safetensors")}
    plan = sg.make_plan("l2c", schedule={"sigmas": SIGMAS}, example_inputs=example, theta=1.0, **options)
    assert plan.rows == rows(plan, router, 1.0)
    assert plan.summary().ideal_speedup > 1.3
    with pytest.raises(PlanError, match="trained for timesteps"):
        sg.make_plan("l2c", example_inputs=example, **options)
    with pytest.raises(PlanError, match="trained for timestep "):
        sg.make_plan("l2c", schedule={"sigmas": SIGMAS}, example_inputs=example, timestep=("cast",), **options)


def test_the_policy_trains_on_what_the_plan_is_made_with(model, scheduler, router):
    few = {"iterations": 2, "batch": 8, "pool": POOL}
    plan = sg.make_plan(
        "l2c", model=model, scheduler=scheduler, steps=4, conditioning=conditioning(), schedule={"sigmas": SIGMAS}, **few
    )
    assert plan.rows == rows(plan, router, 0.5)


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        (
            conditioning(unconditional=False),
            {},
            r"label_dropout is 0\.1, but conditioning has no unconditional inputs; pass neg",
        ),
        (conditioning(4), {}, "conditioning is of 4 samples, the pool of 6; pass as many rows, or pool=4"),
        (conditioning() | {"nose": torch.zeros(POOL)}, {}, "conditioning has nose, which FluxTransformer2DModel is not"),
        (None, {}, "FLUX is conditioned on text embeddings"),
        (conditioning(), {"states": "q_sample"}, "FlowMatchEulerDiscreteScheduler has no add_noise"),
    ],
    ids=["no unconditional", "rows", "stray", "none", "noised"],
)
def test_what_does_not_fit_is_refused(model, scheduler, given, changes, message):
    with pytest.raises(sg.StepgraphError, match=message):
        train(model, scheduler, settings=replace(FEW, **changes), conditioning=given)


def test_without_dropout_nothing_unconditional_is_needed(model, scheduler):
    settings = replace(FEW, label_dropout=0.0)
    trained = train(model, scheduler, settings=settings, conditioning=conditioning(unconditional=False))
    assert trained.history.isfinite().all()
