"""Fingerprints: what changes them, what does not, and that they notice writes."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from helpers.tiny import TINY, tiny_dit
from stepgraph.errors import MismatchError
from stepgraph.fingerprint import config_of, fingerprint, has_data, hash_config, tensor_digest


def parts(model: nn.Module) -> list[str]:
    return fingerprint(model).split("/")


def test_equal_models_have_equal_fingerprints(dit):
    structure, contents = parts(dit)
    assert parts(tiny_dit()) == [structure, contents]
    assert len(structure) == len(contents) == 16
    assert int(structure, 16) != int(contents, 16)


CHANGES = {
    "one weight": (lambda m: m.proj_out_2.bias[0].add_(1e-3), False, True),
    "one buffer": (lambda m: m.pos_embed.pos_embed[0, 0, 0].add_(1e-3), False, True),
    "precision": (lambda m: m.bfloat16(), False, True),
    "a copy of a weight": (lambda m: setattr(m.proj_out_2, "bias", nn.Parameter(m.proj_out_2.bias.clone())), False, False),
    "another shape": (lambda m: setattr(m, "proj_out_2", nn.Linear(32, 48)), True, True),
    "a new name": (lambda m: m.register_parameter("extra", nn.Parameter(torch.zeros(1))), True, True),
    "swapped names": (lambda m: m.register_buffer("pos_embed_2", torch.zeros(1)), True, True),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_a_fingerprint(case):
    change, structure, contents = CHANGES[case]
    model = tiny_dit()
    before = parts(model)
    with torch.no_grad():
        change(model)
    after = parts(model)
    assert [a != b for a, b in zip(before, after, strict=True)] == [structure, contents]


def test_configuration_and_class_are_part_of_the_structure(dit):
    # The same parameters under another configuration.
    assert parts(tiny_dit(norm_eps=1e-4))[0] != parts(dit)[0]
    assert parts(tiny_dit(norm_eps=1e-4))[1] == parts(dit)[1]

    class Other(diffusers.DiTTransformer2DModel):
        """The same model by another name."""

    torch.manual_seed(0)
    assert parts(Other(**TINY).eval())[0] != parts(dit)[0]


def test_a_model_without_data_has_no_contents(dit):
    with torch.device("meta"):
        hollow = diffusers.DiTTransformer2DModel(**TINY).eval()
    assert not has_data(hollow.proj_out_2.weight)
    structure, contents = parts(hollow)
    assert contents == "-"
    assert structure == parts(dit)[0]


def test_digests_are_kept_until_the_tensor_is_written_to():
    tensor = torch.arange(6.0)
    first = tensor_digest(tensor)
    assert tensor_digest(tensor) is tensor_digest(tensor)
    tensor[2] = 9
    assert tensor_digest(tensor) != first
    tensor[2] = 2
    assert tensor_digest(tensor) == first
    # Neither strides nor inference mode change what a tensor holds.
    assert tensor_digest(torch.arange(6.0).reshape(2, 3).T.contiguous().T) == first
    with torch.inference_mode():
        held = torch.arange(6.0)
        assert tensor_digest(held) == first
        held[0] = 5
        assert tensor_digest(held) != first


def test_data_that_is_swapped_is_noticed():
    parameter = nn.Parameter(torch.zeros(4))
    before = tensor_digest(parameter)
    parameter.data = torch.ones(4)
    assert tensor_digest(parameter) != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_all_dtypes_have_digests(dtype):
    zeros, ones = (torch.full((3,), value).to(dtype) for value in (0, 1))
    assert tensor_digest(zeros) != tensor_digest(ones)
    assert len(tensor_digest(zeros[:0])) == len(tensor_digest(torch.tensor(1).to(dtype))) == 32


def test_configurations_are_compared_by_value():
    assert hash_config({"a": 1, "b": [1, 2]}) == hash_config({"b": [1, 2], "a": 1})
    assert hash_config({"a": 1}) != hash_config({"a": 2})
    assert "_class_name" not in config_of(diffusers.DDIMScheduler())
    assert config_of(diffusers.DDIMScheduler())["num_train_timesteps"] == 1000
    assert config_of(nn.Linear(1, 1)) == {}
    owner = nn.Linear(1, 1)
    owner.config = SimpleNamespace(layers=2)
    with pytest.raises(MismatchError, match=r"the config of a Linear is a SimpleNamespace, .*expected a mapping"):
        config_of(owner)


def test_a_change_of_the_whole_tensor_through_data_is_noticed():
    # `.data` moves no version counter; fusing a LoRA writes that way.
    model = nn.Linear(64, 64)
    before = fingerprint(model)
    version = model.weight._version
    model.weight.data.add_(0.5)
    assert model.weight._version == version
    assert fingerprint(model) != before
