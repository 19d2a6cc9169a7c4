"""Weights that change after compiling: the next run is the eager model's with the weights as they are, or is refused."""

import copy

import pytest
import torch
from torch import nn

import stepgraph as sg
from helpers.captures import tape  # noqa: F401 (a fixture)
from helpers.tiny import inputs, tiny_dit
from helpers.written_weights import (
    CHANGES,
    WAYS,
    assert_follows,
    compiled,
    followed,
    linears,
    load_file,
    numbers,
    sampled,
    write_data,
)
from stepgraph.contents import Scattered
from stepgraph.errors import CompileError, MismatchError
from stepgraph.packed_weights import forget_packed
from stepgraph.runtime.program import bound_weights, packed_linear


@pytest.fixture
def original(way) -> tuple[nn.Module, sg.Executable]:
    """A model with its first weights, and its executable."""
    model, exe, state = followed(way)
    model.load_state_dict(state)
    return model, exe


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS)
def test_the_next_run_is_that_of_the_new_weights(original, change):
    assert_follows(*original, CHANGES[change])


@pytest.mark.parametrize("way", ["exact", "captured"])
def test_a_file_that_is_loaded_is_followed(original, tmp_path):
    assert_follows(*original, lambda model: load_file(model, tmp_path))


@pytest.mark.parametrize("change", ["lora", "average", "data"])
@pytest.mark.parametrize("way", ["packed"])
def test_without_a_look_at_contents_the_old_weights_would_run(original, change, monkeypatch):
    """What the tests above test."""
    model, exe = original
    sampled(exe)
    monkeypatch.setattr(Scattered, "look", lambda *_: [])
    with pytest.raises(AssertionError):
        assert_follows(model, exe, CHANGES[change])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["lora", "unfused", "average"])
def test_small_changes_show_in_every_weight_that_they_touch(dtype, change):
    """Also where rounding swallows most of them; 256 values of weights as wide as real ones."""
    model = tiny_dit(num_attention_heads=4, attention_head_dim=64, num_layers=1).to(dtype)
    touched = [linear.weight for linear in linears(model)]
    some = Scattered(touched)
    CHANGES[change](model) if change != "average" else [
        w.data.mul_(0.99).add_(0.01 * torch.randn_like(w) * w.std()) for w in touched
    ]
    assert some.look(touched) == list(range(len(touched)))
    assert some.look(touched) == []


def test_tensors_without_versions_are_followed():
    with torch.inference_mode():
        model = tiny_dit()
    exe = compiled(model, cuda_graphs=True)

    def write(model):
        with torch.inference_mode():
            for linear in linears(model):
                linear.weight.mul_(1.5)

    assert_follows(model, exe, write)


@pytest.mark.slow
def test_one_value_is_seen_by_verify(monkeypatch):
    model = tiny_dit(num_attention_heads=4, attention_head_dim=64)
    exe = compiled(model, backend="inductor")
    sampled(exe)
    weight = model.transformer_blocks[0].ff.net[2].weight
    places = torch.ones(weight.numel(), dtype=torch.bool)
    places[bound_weights.Scattered([weight])._outs[0][0][0]] = False
    weight.data.view(-1)[int(places.nonzero()[0])] += 30
    assert (sampled(exe) - sampled(model)).norm() > 1e-4
    assert exe.verify() == ("transformer_blocks.0.ff.net.2.weight",)
    assert (sampled(exe) - sampled(model)).norm() < 1e-4
    assert exe.verify() == ()
    # STEPGRAPH_CHECK reads everything at every run.
    weight.data.view(-1)[int(places.nonzero()[1])] += 30
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    assert (sampled(exe) - sampled(model)).norm() < 1e-4


def test_a_second_executable_does_not_take_the_firsts_stale_copies():
    model = tiny_dit()
    sampled(compiled(model, backend="inductor"))
    write_data(model)
    assert (sampled(compiled(model, backend="inductor")) - sampled(model)).norm() < 1e-4


def test_what_was_packed_of_values_that_are_gone_again_is_dropped():
    """Another executable ran in between, so that versions, addresses and contents are those of this one's last look."""
    model = tiny_dit(num_layers=1)
    exe = compiled(model, backend="inductor")
    sampled(exe)
    weight = model.transformer_blocks[0].ff.net[0].proj.weight
    for written in (weight, weight.data):
        with torch.no_grad():
            before = weight.clone()
            written.mul_(3)
            forget_packed([weight])
            packed_linear.PACKED.get(weight)
            weight.data.copy_(before)
        count = packed_linear.PACKED.last
        assert (sampled(exe) - sampled(model)).norm() < 1e-4
        # Packed again once, and good from then on.
        assert packed_linear.PACKED.last > count
        count = packed_linear.PACKED.last
        assert (sampled(exe) - sampled(model)).norm() < 1e-4
        assert packed_linear.PACKED.last == count


def test_dicts_of_tensors_that_were_replaced_are_followed():
    model = tiny_dit()
    exe = compiled(model)
    layer = model.transformer_blocks[1].attn1.to_v

    def other_tensors(_):
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.weight.mul_(3)
        layer.__dict__.update(vars(twin))

    assert_follows(model, exe, other_tensors)
    # And then what is written to the new ones.
    assert_follows(model, exe, lambda _: layer._parameters["weight"].data.mul_(2))
    layer._parameters = {"weight": layer.weight}
    with pytest.raises(CompileError, match="parameters or buffers"):
        sampled(exe)


def test_dicts_of_modules_that_were_replaced_are_refused():
    model = tiny_dit()
    exe, blocks = compiled(model), model.transformer_blocks
    children = vars(blocks)["_modules"]
    blocks._modules = dict(children)
    sampled(exe)
    for others in (dict(reversed(children.items())), {**children, "2": copy.deepcopy(blocks[1])}, {}):
        blocks._modules = others
        with pytest.raises(CompileError, match=r"other parts .*transformer_blocks"):
            sampled(exe)
    blocks._modules = children
    sampled(exe)
    layer = blocks[0].attn1.to_v
    layer.__dict__ = dict(vars(layer))
    with pytest.raises(CompileError, match=r"attributes of 'transformer_blocks\.0\.attn1\.to_v'"):
        sampled(exe)


def late(exe) -> sg.Executable:
    exe.weights.later = True
    return exe


def test_a_captured_run_is_replayed_with_what_the_digest_finds(tape):  # noqa: F811
    model = tiny_dit()
    exe = late(compiled(model, backend="eager", cuda_graphs=True))
    assert_follows(model, exe, write_data)
    assert tape[0].replayed == [0, 1, 0, 1, 0, 1, 0, 1]
    sampled(exe)
    assert tape[0].replayed[8:] == [0, 1]


def test_what_the_plan_does_not_follow_is_refused_at_the_runs_end():
    model = tiny_dit()
    exe = late(numbers(model))
    session = exe.session()
    write_data(model)
    for timestep in exe.plan.header.timesteps[:-1]:
        session(**inputs(2, timestep=int(timestep)))
    with pytest.raises(MismatchError, match="computes with numbers that were measured"):
        session(**inputs(2, timestep=int(exe.plan.header.timesteps[-1])))
