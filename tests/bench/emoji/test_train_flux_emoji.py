"""How flux-emoji is trained, and what is made of it; on five icons of 8 x 8 pixels."""

import json
import os
import signal

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.emoji import RECIPE, drawn_icons
from helpers.oracle_families import FluxOracle
from stepgraph.assets.flux_emoji import load_flux_emoji, load_retrieval, positions, unpacked
from stepgraph.bench.emoji.emoji_data import EmojiData
from stepgraph.bench.emoji.evaluate_emoji import pictures_of
from stepgraph.bench.emoji.train_flux_emoji import (
    RECIPES,
    FlowLoss,
    Recipe,
    build,
    cooled,
    noise_levels,
    packed,
    rate_factor,
    train,
)
from stepgraph.bench.emoji.train_retrieval import save_retrieval, train_retrieval
from stepgraph.bench.training import Training
from stepgraph.errors import ArgumentError, MismatchError

CPU = torch.device("cpu")


def weights_in(folder) -> dict[str, torch.Tensor]:
    pipe, encoder = load_flux_emoji(folder)
    return {**pipe.transformer.state_dict(), **{f"text.{key}": value for key, value in encoder.state_dict().items()}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model after three steps."""
    out = tmp_path_factory.mktemp("whole")
    assert train("tiny", RECIPE, drawn_icons(), out, CPU, steps=3, bf16=False)
    return out / "tiny"


def test_a_training_that_is_taken_up_again_comes_to_the_same_bits(trained, tmp_path):
    calls = 0
    # No time at all is left: a checkpoint before the first step. Then SIGTERM during the second one.
    assert not train("tiny", RECIPE, drawn_icons(), tmp_path, CPU, steps=3, bf16=False, limit_s=0)
    original = Training.advance

    def interrupted(self, loss, factor):
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, loss, factor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "advance", interrupted)
        assert not train("tiny", RECIPE, drawn_icons(), tmp_path, CPU, steps=3, bf16=False)
    assert calls == 2
    other = Recipe(**{**vars(RECIPE), "batch": 8})
    with pytest.raises(MismatchError, match="finish that run, or remove the file"):
        train("tiny", other, drawn_icons(), tmp_path, CPU, steps=3, bf16=False)
    torch.manual_seed(99)
    assert train("tiny", RECIPE, drawn_icons(), tmp_path, CPU, steps=3, bf16=False)
    expected, got = weights_in(trained), weights_in(tmp_path / "tiny")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    record = json.loads((tmp_path / "tiny-training.json").read_text())["results"]
    assert record["steps"] == 3
    assert not list(tmp_path.glob("*.checkpoint.pt"))
    assert (tmp_path / "tiny-loss.png").stat().st_size > 0


def test_weights_are_stored_in_half_precision_with_the_artwork_s_licence(trained):
    model = diffusers.FluxTransformer2DModel.from_pretrained(trained / "transformer", torch_dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert "Copyright (c) Microsoft Corporation" in (trained / "NOTICE.txt").read_text()
    with pytest.raises(ArgumentError, match=r"lacks transformer, vae, text, scheduler .* trains it"):
        load_flux_emoji(trained / "nowhere")


def test_the_time_that_was_set_says_when_the_last_part_begins(tmp_path):
    linear = torch.nn.Linear(2, 1)
    training = Training([linear], tmp_path / "a.checkpoint.pt", {}, rate=0.1, keep=0.9, device=CPU, budget_s=10, steady=0.6)

    def loss():
        # As if a step took a second.
        training.seconds = training.step + 1.0
        return linear(torch.ones(1, 2)).sum()

    assert training.run("a", loss, lambda: 1.0, 60)
    assert training.step == training.total == 10


def test_averages_begin_near_the_weights_and_then_keep_most_of_themselves(tmp_path):
    linear = torch.nn.Linear(1, 1, bias=False)
    training = Training([linear], tmp_path / "a.checkpoint.pt", {}, rate=0.1, keep=0.5, device=CPU, total=3)
    expected = linear.weight.detach().clone()
    for step in range(3):
        training.advance(linear(torch.ones(1, 1)).sum(), 1.0)
        keep = min(0.5, (step + 1) / (step + 10))
        expected = keep * expected + (1 - keep) * linear.weight.detach()
    training.use_average()
    assert torch.allclose(linear.weight, expected, atol=1e-6)


def test_pixels_come_back_from_tokens():
    pictures = torch.randn(2, 3, 8, 8)
    assert torch.equal(unpacked(packed(pictures)), pictures)


def test_tokens_and_positions_are_those_of_flux_s_pipeline():
    pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = torch.nn.functional.pixel_unshuffle(pictures, 2)
    assert torch.equal(packed(pictures), diffusers.FluxPipeline._pack_latents(latents, 2, 12, 8, 8))
    assert torch.equal(positions(16, CPU), diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 4, CPU, torch.float32))


def test_the_loss_is_that_of_flow_matching():
    data = EmojiData(drawn_icons())
    transformer, encoder = build(RECIPE, data.icons.names)
    seen = {}

    def perfect(hidden_states, timestep, **_):
        """Knows the noise and the picture: with these the velocity follows, and the loss is 0."""
        share, clean = timestep[:, None, None], packed(torch.stack(pictures))
        noise = (hidden_states - (1 - share) * clean) / share
        seen.update(clean=clean, noise=noise)
        return (noise - clean,)

    pictures: list[torch.Tensor] = []
    original = data.batch

    def batch(*arguments):
        drawn = original(*arguments)
        pictures[:] = drawn.pictures
        return drawn

    data.batch = batch  # type: ignore[method-assign]
    torch.manual_seed(0)
    loss = FlowLoss(RECIPE, data, perfect, encoder, bf16=False)
    assert float(loss(0, None)) < 1e-6
    assert seen["noise"].shape == (4, 4, 48)
    assert float(seen["noise"].std()) == pytest.approx(1, abs=0.15)
    loss.transformer = lambda **inputs: (perfect(**inputs)[0] + 1,)
    assert float(loss(0, None)) == pytest.approx(1, abs=1e-5)
    assert transformer.config.in_channels == 48


def test_levels_and_rates():
    assert torch.allclose(noise_levels(torch.zeros(1), 3.0), torch.tensor([0.75]))
    assert rate_factor(0, None) == pytest.approx(1 / 300)
    assert rate_factor(5000, None) == rate_factor(6000, 10_000) == 1.0
    assert rate_factor(8000, 10_000) == pytest.approx(0.51)
    assert rate_factor(10_000, 10_000) == pytest.approx(0.02)
    assert [cooled(step, 10) for step in (0, 6, 8, 10)] == pytest.approx([0, 0, 0.5, 1])


@pytest.mark.parametrize(("name", "tokens", "least", "most"), [("flux-emoji", 64, 4e6, 8e6), ("flux-emoji-l", 256, 12e6, 20e6)])
def test_the_recipes_fit_their_sizes(name: str, tokens: int, least: float, most: float):
    with torch.device("meta"):
        transformer, encoder = build(RECIPES[name], ("pizza",))
    assert least <= sum(parameter.numel() for parameter in transformer.parameters()) <= most
    assert len(positions(RECIPES[name].size, CPU)) == tokens
    assert encoder.config.width == transformer.config.joint_attention_dim


@pytest.mark.traces
@pytest.mark.parametrize(("policy", "arguments"), [("full", {}), ("interval", {"every": 2})])
def test_the_product_s_plans_run_in_its_pipeline(trained, policy, arguments):
    pipe, encoder = load_flux_emoji(trained)
    how = {"size": 8, "steps": 4, "guidance": 2.0, "seed": 5}
    prompts = ["pizza on mint", "waving hand on slate"]
    eager = pictures_of(pipe, encoder, prompts, **how)
    assert eager.shape == (2, 3, 8, 8)
    assert not torch.equal(eager, pictures_of(pipe, encoder, prompts, **{**how, "guidance": 1.0}))
    encoded = encoder.encode(prompts)
    example = {
        "hidden_states": torch.zeros(2, 4, 48), "timestep": torch.zeros(2), "encoder_hidden_states": encoded["prompt_embeds"],
        "pooled_projections": encoded["pooled_prompt_embeds"], "img_ids": positions(8, CPU), "txt_ids": encoded["text_ids"],
    }  # fmt: skip
    plan = sg.make_plan(
        policy,
        model=pipe.transformer,
        scheduler=pipe.scheduler,
        steps=4,
        guidance="separate",
        example_inputs=example,
        **arguments,
    )
    executable = sg.compile(pipe.transformer, plan, example, backend="eager", exact=True).attach(pipe)
    got = pictures_of(pipe, encoder, prompts, **how)
    executable.detach()
    if policy == "interval":
        with FluxOracle.of(pipe.transformer, plan).in_place_of_model():
            eager = pictures_of(pipe, encoder, prompts, **how)
    assert torch.equal(got, eager)


def test_the_retrieval_network_is_kept_with_its_names(tmp_path):
    icons = drawn_icons()
    network = train_retrieval(icons, 2, CPU, batch=4)
    save_retrieval(network, icons, tmp_path / "retrieval.safetensors")
    loaded, names = load_retrieval(tmp_path / "retrieval.safetensors")
    assert names == list(icons.names)
    pictures = EmojiData(icons).still()
    assert torch.allclose(loaded(pictures), network(pictures), atol=0.02)
