"""Models that were away, copied or laid out otherwise after compiling: they run again, or are refused until they are back."""

import copy

import pytest
import torch
from torch import nn

from helpers.captures import tape  # noqa: F401 (a fixture)
from helpers.tiny import tiny_dit
from helpers.written_weights import (
    WAYS,
    assert_follows,
    compiled,
    sampled,
    write_data,
)
from stepgraph.compiler.tracing import trace as trace_file
from stepgraph.errors import CompileError
from stepgraph.fingerprint import fingerprint
from stepgraph.runtime.export.runner import Runner, ScheduleError, write_tensors


def parked(model):
    model._apply(torch.clone)


def converted(model):
    model.to(torch.float64).to(torch.float32)


def through_meta(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to("meta")
    model.load_state_dict(state, assign=True)
    for name, buffer in buffers.items():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, buffer)


MOVES = {"parked": parked, "converted": converted, "meta": through_meta}


@pytest.fixture
def traces(monkeypatch):
    seen = []
    run = trace_file._run
    monkeypatch.setattr(trace_file, "_run", lambda model, *rest: (seen.append(model), run(model, *rest))[1])
    return seen


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("way", [*WAYS, "whole"])
def test_a_model_that_was_away_runs_again_without_a_trace(move, way, traces):
    model = tiny_dit()
    exe = compiled(model, **(WAYS | {"whole": {"backend": "inductor", "regions": False}})[way])
    before = sampled(exe)
    traces.clear()
    for _ in range(2):
        MOVES[move](model)
        assert torch.equal(sampled(exe), before)
    # What the programs hold now are the model's tensors.
    assert_follows(model, exe, write_data)
    model.pos_embed.pos_embed.mul_(2)
    assert (sampled(exe) - sampled(model)).norm() < 1e-4 * before.norm()
    assert traces == []


def test_a_copy_in_the_pipeline_runs_with_its_own_weights(traces):
    model = tiny_dit()
    exe = compiled(model, backend="inductor")
    before = sampled(exe)
    other = copy.deepcopy(model)
    traces.clear()
    on = exe.on(other)
    assert torch.equal(sampled(on), before)
    write_data(other)
    assert (sampled(on) - sampled(other)).norm() < 1e-4
    assert torch.equal(sampled(exe), before)
    assert traces == []
    assert exe.on(model) is exe


@pytest.mark.slow
def test_exports_hold_the_weights_as_they_are_and_take_no_others(tmp_path):
    model = tiny_dit()
    exe = compiled(model)
    parked(model)
    write_data(model)
    exe.export(tmp_path / "out")
    runner = Runner(tmp_path / "out")
    assert runner.schedule["fingerprint"] == fingerprint(model) != exe.plan.header.fingerprint
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(torch.equal(tensor, held[name]) for name, tensor in runner.weights.items() if name in held)
    assert "pos_embed.pos_embed" in runner.weights
    others = {name: tensor * 2 for name, tensor in runner.weights.items()}
    write_tensors(tmp_path / "out" / "weights.safetensors", others)
    with pytest.raises(ScheduleError, match=r"weights.safetensors is not what was exported"):
        Runner(tmp_path / "out")


def test_models_of_another_make_are_no_copies():
    exe = compiled(tiny_dit())
    with pytest.raises(CompileError, match="has another configuration than the one that was compiled"):
        exe.on(tiny_dit(num_layers=3))
    with pytest.raises(CompileError, match=r"has the dtype bfloat16; .*compiled for float32"):
        exe.on(tiny_dit().to(torch.bfloat16))
    changed = tiny_dit()
    changed.transformer_blocks[0].attn1.to_q = nn.Sequential(changed.transformer_blocks[0].attn1.to_q)
    with pytest.raises(CompileError, match=r"'transformer_blocks.0.attn1.to_q' \(before Linear, now Sequential;"):
        exe.on(changed)


def test_other_layouts_are_refused_until_they_are_back():
    model = tiny_dit()
    exe = compiled(model)
    before = sampled(exe)
    model.to(torch.float64)
    with pytest.raises(CompileError, match="has the dtype float64; the executable was compiled for float32: bring the model"):
        sampled(exe)
    model.to(torch.float32)
    assert torch.equal(sampled(exe), before)
    weight = model.transformer_blocks[0].attn1.to_q.weight
    weight.data = weight.data.t()
    for _ in range(2):
        with pytest.raises(CompileError, match=r"to_q.weight has the strides \[1, 32\]; .* compiled for \[32, 1\]"):
            sampled(exe)
    weight.data = weight.data.t()
    assert torch.equal(sampled(exe), before)
    model.proj_out_1.register_parameter("more", nn.Parameter(torch.zeros(1)))
    with pytest.raises(CompileError, match="has parameters or buffers that it did not have"):
        sampled(exe)


def test_modules_of_the_same_make_in_their_places_are_followed(traces):
    model = tiny_dit()
    exe = compiled(model)
    before = len(traces)

    def exchange(_):
        other = copy.deepcopy(model.transformer_blocks[1])
        with torch.no_grad():
            other.attn1.to_v.weight.mul_(3)
        model.transformer_blocks[1] = other

    assert_follows(model, exe, exchange)
    assert_follows(model, exe, lambda _: model.transformer_blocks[1].ff.net[2].weight.data.mul_(2))
    assert len(traces) == before
