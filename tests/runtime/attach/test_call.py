import pytest
import torch

from stepgraph.runtime.attach.call import Call, same_values


def call_with(conditioning, latents: torch.Tensor) -> Call:
    return Call.of({"hidden_states": latents, "timestep": torch.zeros(1), "text": conditioning}, "hidden_states")


@pytest.mark.parametrize(
    "wrap",
    [lambda tensor: tensor, lambda tensor: [tensor], lambda tensor: (tensor, tensor), lambda tensor: {"a": {"b": tensor}}],
    ids=["tensor", "list", "tuple", "dict"],
)
def test_conditions_are_told_apart_wherever_they_lie(wrap):
    latents = torch.zeros(1, 3)
    one = call_with(wrap(torch.tensor([1.0, 2.0])), latents)
    same = call_with(wrap(torch.tensor([1.0, 2.0])), latents + 1)
    other = call_with(wrap(torch.tensor([1.0, 2.5])), latents)
    assert same_values(one.conditioning, same.conditioning)
    assert not same_values(one.conditioning, other.conditioning)


def test_what_changes_at_every_step_is_no_condition():
    inputs = {"x": [torch.zeros(3)], "t": torch.zeros(1), "audio_hidden_states": torch.zeros(2), "text": torch.zeros(1)}
    assert list(Call.of(inputs, "x").conditioning) == ["text"]
