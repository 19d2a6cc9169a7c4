import pytest
import torch

from stepgraph.errors import ArgumentError
from stepgraph.scheduler import model_calls, split_conditioning

TEXT, IDS = torch.ones(2, 3), torch.arange(12.0).view(4, 3)


def test_both_halves_of_guidance_share_the_positions_of_tokens():
    cond, uncond = split_conditioning({"text": TEXT, "negative_text": -TEXT, "img_ids": IDS}, 2.0)
    (batched,) = model_calls(cond, uncond, separate=False)
    assert torch.equal(batched["text"], torch.cat([TEXT, -TEXT]))
    assert torch.equal(batched["img_ids"], IDS)
    for call, text in zip(model_calls(cond, uncond, separate=True), (TEXT, -TEXT), strict=True):
        assert torch.equal(call["text"], text)
        assert torch.equal(call["img_ids"], IDS)


def test_positions_may_be_given_twice_but_not_differ():
    given = {"text": TEXT, "negative_text": TEXT, "img_ids": IDS}
    assert split_conditioning({**given, "negative_img_ids": IDS.clone()}, 2.0)[1] is not None
    with pytest.raises(ArgumentError, match="img_ids and negative_img_ids differ"):
        split_conditioning({**given, "negative_img_ids": IDS + 1}, 2.0)


def test_other_inputs_need_their_unconditional_one():
    with pytest.raises(ArgumentError, match="needs the unconditional input negative_text"):
        split_conditioning({"text": TEXT, "img_ids": IDS}, 2.0)
