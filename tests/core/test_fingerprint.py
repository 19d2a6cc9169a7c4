"""Fingerprints: what changes them, what does not, and that they notice writes."""

import hashlib
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from helpers.captures import planned
from helpers.tiny import TINY, tiny_dit, tiny_scheduler
from stepgraph.errors import MismatchError
from stepgraph.fingerprint import config_of, fingerprint, has_data, hash_config, structure_hash, tensor_digest
from stepgraph.plan.factors import refuse_model
from stepgraph.plan.refuse_other import refuse_other_model


def parts(model: nn.Module) -> list[str]:
    return fingerprint(model).split("/")


def test_equal_models_have_equal_fingerprints(dit):
    structure, contents = parts(dit)
    assert parts(tiny_dit()) == [structure, contents]
    assert len(structure) == len(contents.removeprefix("s")) == 16
    assert int(structure, 16) != int(contents[1:], 16)


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


def contents_written_out(model: nn.Module) -> str:
    """SHA-256 of names, dtypes and bytes, as plans had it before there were sums."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    contents = hashlib.sha256()
    for name in sorted(tensors):
        raw = tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        contents.update(f"{name} {tensors[name].dtype}".encode() + hashlib.sha256(raw).digest())
    return contents.hexdigest()[:16]


def test_files_of_before_are_compared_by_what_they_state(caplog, monkeypatch):
    monkeypatch.setenv("STEPGRAPH_LOG", "info")
    model = tiny_dit().bfloat16()
    stated = f"{structure_hash(model)}/{contents_written_out(model)}"
    with caplog.at_level("INFO", "stepgraph.fingerprint"):
        assert fingerprint(model, stated) == fingerprint(model, stated) == stated
    assert [record.message for record in caplog.records if "SHA-256 of the weights of DiT" in record.message] != []
    assert len(caplog.records) == 1
    assert fingerprint(model, "0/-") == fingerprint(model, fingerprint(model)) == fingerprint(model) != stated
    plan = planned(model, tiny_scheduler("ddim"))
    old = plan.with_header(fingerprint=stated)
    refuse_other_model(old.header, model)
    refuse_model("the factors are", ("DiTTransformer2DModel", stated, "bfloat16"), model)
    with torch.no_grad():
        model.proj_out_2.bias[0].add_(1.0)
    with pytest.raises(MismatchError, match=rf"other weights .*\(hash {stated.split('/')[1]}, this model's [0-9a-f]{{16}}\)"):
        refuse_other_model(old.header, model)
    with pytest.raises(MismatchError, match="other weights"):
        refuse_model("the factors are", ("DiTTransformer2DModel", stated, "bfloat16"), model)


def test_contents_tell_where_values_stand():
    """Words that trade places, within a tensor and between two, and two tensors of one sum."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    prints = {fingerprint(model)}
    with torch.no_grad():
        model[0].weight[[3, 4]] = model[0].weight[[4, 3]]
        prints.add(fingerprint(model))
        model[1].weight[:, [6, 8]] = model[1].weight[:, [8, 6]]
        prints.add(fingerprint(model))
        model[0].weight.data, model[1].weight.data = model[1].weight.data, model[0].weight.data
        prints.add(fingerprint(model))
        model[0].bias.view(torch.int64)[0] += 1
        model[0].bias.view(torch.int64)[1] -= 1
        prints.add(fingerprint(model))
    assert len(prints) == 5


def test_contents_do_not_depend_on_how_a_weight_lies():
    model = tiny_dit()
    before = fingerprint(model)
    linear = model.proj_out_2
    with torch.no_grad():
        linear.weight.data = linear.weight.t().contiguous().t()
        # Not at a multiple of a word.
        storage = torch.zeros(linear.bias.numel() + 1)
        linear.bias.data = storage[1:].copy_(linear.bias)
    assert not linear.weight.is_contiguous()
    assert linear.bias.data_ptr() % 8 == 4
    assert fingerprint(model) == before


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
