"""The states that routers are trained on."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

from helpers.routers import SMALL, sampling, train, trajectories
from helpers.tiny import labels, noise, tiny_scheduler
from stepgraph.compiler.routers.router_states import Conditioning, NoisedLatents
from stepgraph.errors import PlanError


def test_trajectories_are_the_states_of_real_runs(model):
    source = trajectories(model, 3, batch=2, seed=5)
    window = source.window(torch.tensor([0, 2, 3]), 1, torch.Generator().manual_seed(0))
    assert window.steps.tolist() == [[0, 2, 3], [1, 3, 3]]
    assert window.valid.tolist() == [[True] * 3, [True, True, False]]
    own = DDIMScheduler()
    own.set_timesteps(4)
    first, second = window.inputs
    for sample, step in enumerate((0, 2)):
        one = {name: value[sample : sample + 1] for name, value in first.items()}
        assert one["timestep"] == own.timesteps[step]
        predicted = model(**one).sample.chunk(2, dim=1)[0]
        moved = own.step(predicted, own.timesteps[step], one["hidden_states"]).prev_sample
        torch.testing.assert_close(second["hidden_states"][sample : sample + 1], moved, rtol=1e-5, atol=1e-5)
    expected = model(**second).sample
    torch.testing.assert_close(window.targets[0], expected, rtol=1e-5, atol=1e-5)


def test_noised_latents_follow_the_forward_process(model):
    clean = noise(3, seed=4)
    source = NoisedLatents(sampling(model), clean.expand(3, 4, 8, 8), Conditioning(labels(1, 2, 3)), dropout=0.0)
    with torch.no_grad():
        window = source.window(torch.tensor([0, 2, 0, 2] * 64), 1, torch.Generator().manual_seed(0))
    own = DDIMScheduler()
    own.set_timesteps(4)
    level = own.alphas_cumprod[window.inputs[0]["timestep"]].reshape(-1, 1, 1, 1)
    chosen = clean[window.inputs[0]["class_labels"] - 1]
    left = (window.inputs[0]["hidden_states"] - level.sqrt() * chosen) / (1 - level).sqrt()
    # What is left is standard normal: 65536 values.
    assert abs(float(left.mean())) < 0.02
    assert abs(float(left.std()) - 1) < 0.02
    one = {name: value[1:2] for name, value in window.inputs[0].items()}
    moved = own.step(model(**one).sample.chunk(2, dim=1)[0], own.timesteps[2], one["hidden_states"]).prev_sample
    torch.testing.assert_close(window.inputs[1]["hidden_states"][1:2], moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dpm++", "heun"])
def test_solvers_with_a_history_take_real_runs(model, name):
    with pytest.raises(PlanError, match="needs the steps before it, so it cannot start from a noised latent; pass states="):
        train(model, tiny_scheduler(name), settings=replace(SMALL, states="q_sample"))
    trained = train(model, tiny_scheduler(name), settings=replace(SMALL, iterations=1))
    assert trained.logits.shape == (len(trained.header.timesteps), 4)


@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_single_step_solvers_start_from_noised_latents(model, name):
    trained = train(model, tiny_scheduler(name), settings=replace(SMALL, states="q_sample", iterations=1))
    assert (trained.logits[1::2] != 0).all()


def test_schedulers_that_draw_noise_are_refused(model):
    before = torch.get_rng_state()
    with pytest.raises(PlanError, match="EulerAncestralDiscreteScheduler is stochastic"):
        train(model, EulerAncestralDiscreteScheduler())
    assert torch.equal(torch.get_rng_state(), before)


def test_label_dropout_takes_the_null_class(model):
    source = trajectories(model, 40, steps=2, batch=20, dropout=0.5)
    dropped = int((source.conditioning.wanted["class_labels"] == 1000).sum())
    assert 8 < dropped < 32
