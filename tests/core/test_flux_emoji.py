"""flux-emoji's pixels and words, and image classifiers' distances."""

import diffusers
import pytest
import torch

from helpers.distance import SAME_RUN, error
from stepgraph.assets.flux_emoji import PixelVAE, WordEncoder
from stepgraph.assets.image_classifier import ImageClassifier, features_of, perceptual_distance, top_accuracy
from stepgraph.errors import ArgumentError

WORDS = ["mint", "moon", "on", "pizza", "slate"]


@pytest.fixture
def encoder() -> WordEncoder:
    torch.manual_seed(0)
    return WordEncoder(words=WORDS, length=4, width=6)


def test_latents_are_the_pixels(tmp_path):
    PixelVAE().save_pretrained(tmp_path)
    vae = PixelVAE.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    latents = vae.encode(pixels).latents
    assert latents.shape == (2, 12, 4, 3)
    assert torch.equal(latents[1, 4:8, 2, 1], pixels[1, 1, 4:6, 2:4].flatten())
    assert torch.equal(vae.decode(latents, return_dict=False)[0], pixels)
    assert vae.dtype == torch.float32
    assert len(vae.config.block_out_channels) == 2


def test_words_are_numbered_and_the_rest_is_empty(encoder):
    assert encoder.tokens(["Pizza on-mint", ""]).tolist() == [[4, 3, 1, 0], [0, 0, 0, 0]]


def test_an_unknown_word_is_refused_with_the_nearest_known_ones(encoder):
    with pytest.raises(
        ArgumentError, match="does not know the word 'piza' of 'piza on mint'; the nearest known ones are pizza"
    ):
        encoder.encode(["piza on mint"])
    with pytest.raises(ArgumentError, match="none that it knows is near"):
        encoder.encode(["xyxy"])
    with pytest.raises(ArgumentError, match="5 words; flux-emoji takes at most 4"):
        encoder.encode(["pizza on mint on slate"])


def test_text_is_embedded_word_by_word_and_pooled_over_the_words_there_are(encoder):
    encoded = encoder.encode(["pizza on mint", ""])
    weight, places = encoder.embedding.weight, encoder.positions
    first = torch.stack([weight[4] + places[0], weight[3] + places[1], weight[1] + places[2]])
    assert torch.allclose(encoded["prompt_embeds"][0, :3], first)
    assert torch.allclose(encoded["pooled_prompt_embeds"][0], encoder.pooled(first.mean(0)), atol=1e-6)
    assert torch.equal(encoded["pooled_prompt_embeds"][1], encoder.pooled.bias)


def test_text_ids_are_the_pipeline_s_own(encoder):
    pipe = diffusers.FluxPipeline.__new__(diffusers.FluxPipeline)
    pipe.__dict__.update(text_encoder=None, text_encoder_2=None, transformer=torch.nn.Linear(1, 1))
    pipe.transformer.dtype = torch.float32
    arguments = encoder.encode(["pizza on mint"])
    ids = arguments.pop("text_ids")
    assert torch.equal(pipe.encode_prompt(None, None, device="cpu", **arguments)[2], ids)


def test_guidance_takes_the_empty_prompt_beside(encoder):
    plain, guided = encoder.arguments(["moon"]), encoder.arguments(["moon"], 3.0)
    assert set(plain) == {"prompt_embeds", "pooled_prompt_embeds"}
    assert guided["true_cfg_scale"] == 3.0
    assert torch.equal(guided["negative_prompt_embeds"], encoder.encode([""])["prompt_embeds"])


def test_words_come_back_from_a_folder(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    loaded = WordEncoder.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in encoder.state_dict().items())
    # The bits of a product depend on where the weights lie.
    pooled, wanted = (one.encode(["moon"])["pooled_prompt_embeds"] for one in (loaded, encoder))
    assert error(pooled, wanted) < SAME_RUN


def test_distances_and_shares_of_a_classifier():
    torch.manual_seed(0)
    classifier = ImageClassifier(6, (4, 8), 5).eval()
    images, others = torch.rand(2, 3, 3, 8, 8) * 2 - 1
    assert features_of(classifier, images).shape == (3, 5)
    assert perceptual_distance(classifier, images, images) == 0
    expected = 0.0
    with torch.no_grad():
        first, second = images, others
        for stage in classifier.stages:
            first, second = stage(first), stage(second)
            cosine = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
            # Unit vectors are 2 - 2 cos apart, squared.
            expected += float((2 - 2 * cosine).mean())
        order = classifier(images).argsort(1, descending=True)
    assert perceptual_distance(classifier, images, others) == pytest.approx(expected, rel=1e-4)
    assert top_accuracy(classifier, images, order[:, 0]) == 1
    assert top_accuracy(classifier, images, order[:, 4], 4) == 0
    assert top_accuracy(classifier, images, order[:, 4], 5) == 1
