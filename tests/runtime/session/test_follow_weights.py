"""Weights that change after compiling: the next run is the eager model's with the weights as they are, or is refused."""

import copy
from functools import cache

import diffusers
import pytest
import safetensors.torch
import torch
from torch import nn

import stepgraph as sg
from helpers.captures import tape  # noqa: F401 (a fixture)
from helpers.distance import error
from helpers.tiny import inputs, labels, noise, tiny_dit
from stepgraph.compiler.tracing import trace as trace_file
from stepgraph.contents import Scattered
from stepgraph.errors import CompileError, MismatchError
from stepgraph.fingerprint import fingerprint
from stepgraph.packed_weights import forget_packed
from stepgraph.plan.measured import measured
from stepgraph.runtime.export.runner import Runner, ScheduleError, write_tensors
from stepgraph.runtime.program import bound_weights, packed_linear
from stepgraph.tolerances import WHOLE_RUN, tolerance

STEPS, DDIM = 3, diffusers.DDIMScheduler(clip_sample=False)
# The same tensors in all runs, so that what is kept of the conditioning stays.
GIVEN = labels(1, 2)


def linears(model) -> list[nn.Linear]:
    return [linear for block in model.transformer_blocks for linear in (block.attn1.to_q, block.attn1.to_v, block.norm1.linear)]


def add_lora(model, sign: int = 1, scale: float = 0.05, rank: int = 4) -> None:
    """Fuse a LoRA as peft does: factors of the size that training leaves them in."""
    generator = torch.Generator().manual_seed(5)
    for linear in linears(model):
        rows, columns = linear.weight.shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, rank, generator=generator) * 0.1
        linear.weight.data += (sign * scale * up @ down).to(linear.weight.dtype)


def average(model) -> None:
    """One step of an exponential moving average at .99."""
    other = tiny_dit(seed=9)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours.data.mul_(0.99).add_(theirs.data.to(ours.dtype), alpha=0.01)


def load(model) -> None:
    model.load_state_dict({name: tensor.to(model.dtype) for name, tensor in tiny_dit(seed=9).state_dict().items()})


def assign(model) -> None:
    model.load_state_dict({name: tensor.to(model.dtype) for name, tensor in tiny_dit(seed=9).state_dict().items()}, assign=True)


def load_file(model, folder) -> None:
    file = folder / "weights.safetensors"
    safetensors.torch.save_file({name: tensor.to(model.dtype) for name, tensor in tiny_dit(seed=9).state_dict().items()}, file)
    safetensors.torch.load_model(model, file, strict=False)


def train(model) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    given = inputs(2)
    model(
        given["hidden_states"].to(model.dtype), timestep=given["timestep"], class_labels=given["class_labels"]
    ).sample.mean().backward()
    optimizer.step()
    model.requires_grad_(False)


def write_without_versions(model) -> None:
    with torch.inference_mode():
        for linear in linears(model):
            linear.weight.mul_(1.5)


def write_data(model) -> None:
    for linear in linears(model):
        linear.weight.data.mul_(1.5)


# What moves no version counter, so that contents alone tell.
UNCOUNTED = {"lora": add_lora, "average": average, "data": write_data}
CHANGES = UNCOUNTED | {
    "unfused": lambda model: add_lora(model, -1), "load": load, "assign": assign, "train": train,
    "inference": write_without_versions,
}  # fmt: skip
WAYS = {
    "exact": {"backend": "eager", "exact": True},
    "packed": {"backend": "inductor"},
    "hoisted": {"backend": "eager"},
    "captured": {"backend": "eager", "cuda_graphs": True},
}


def compiled(model, actions=None, **options) -> sg.Executable:
    """A plan that reuses nothing, or what `actions` say."""
    policy = {"policy": "manual", "actions": actions} if actions else {"policy": "full"}
    plan = sg.make_plan(model=model, scheduler=DDIM, steps=STEPS, **policy)
    given = inputs(2)
    given["hidden_states"] = given["hidden_states"].to(model.dtype)
    return sg.compile(model, plan, given, **({"backend": "eager"} | options))


def sampled(runner, dtype=torch.float32) -> torch.Tensor:
    return sg.sample(runner, DDIM, noise(2).to(dtype), steps=STEPS, **GIVEN)


def assert_follows(model, exe, change) -> None:
    before = sampled(exe, model.dtype)
    change(model)
    got, wanted = sampled(exe, model.dtype), sampled(model, model.dtype)
    assert not torch.equal(got, before)
    close = 0.0 if exe.config.exact else tolerance(WHOLE_RUN, model.dtype)
    assert error(got, wanted) <= close


@cache
def followed(way: str) -> tuple[nn.Module, sg.Executable, dict[str, torch.Tensor]]:
    """A model, its executable, and what its weights were, for all tests that change them."""
    model = tiny_dit()
    return model, compiled(model, **WAYS[way]), copy.deepcopy(model.state_dict())


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


# ---- on an accelerator, where contents are digested during the run


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


# ---- other objects


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


# ---- which plan follows which values


def numbers(model) -> sg.Executable:
    """A plan with coefficients that nobody accounts for, as a fit leaves them."""
    plan = sg.make_plan("interval", model=model, scheduler=DDIM, steps=STEPS, every=2)
    plan = sg.forecast(plan, order=0)
    return sg.compile(model, plan.with_header(arguments={}), inputs(2), backend="eager")


def choice(model, **options) -> sg.Executable:
    stats = sg.calibrate(model, DDIM, steps=STEPS, samples=1)
    plan = sg.make_plan("smoothcache", stats, alpha=0.5)
    return sg.compile(model, plan, inputs(2), backend="eager", **options)


def test_what_was_measured_is_known():
    model = tiny_dit()
    full = compiled(model).plan
    assert measured(full) == "nothing"
    interval = sg.make_plan("interval", model=model, scheduler=DDIM, steps=STEPS, every=2)
    assert measured(sg.forecast(interval)) == "nothing"
    assert measured(sg.lowrank(interval)) == "numbers"
    assert measured(numbers(model).plan) == "numbers"
    chosen = choice(model).plan
    assert measured(chosen) == measured(sg.CachePlan.from_json(chosen.to_json())) == "choice"
    # Files from before the field was there.
    assert measured(chosen.with_header(measured="")) == measured(interval.with_header(policy="l2c", measured="")) == "choice"
    assert measured(interval.with_header(measured="")) == "nothing"


def test_plans_with_numbers_refuse_other_values_until_the_old_are_back():
    model = tiny_dit()
    exe = numbers(model)
    before, state = sampled(exe), copy.deepcopy(model.state_dict())
    write_data(model)
    with pytest.raises(
        MismatchError, match=r"norm1.linear.weight and \d more weights hold other values .* put those weights back"
    ):
        sampled(exe)
    with pytest.raises(MismatchError, match="the plan is for other weights"):
        sg.compile(model, exe.plan, inputs(2), backend="eager")
    with pytest.raises(MismatchError, match="hold other values"):
        exe.on(copy.deepcopy(model))
    model.load_state_dict(state)
    assert torch.equal(sampled(exe), before)


def test_plans_that_chose_warn_once_or_refuse(caplog):
    model = tiny_dit()
    exe, strict = choice(model), choice(model, strict=True)
    caplog.clear()
    for _ in range(2):
        write_data(model)
        assert (sampled(exe) - sampled(exe)).norm() == 0
    assert [record.message for record in caplog.records if "chosen by measuring the former" in record.message] != []
    assert len([record for record in caplog.records if record.name == "stepgraph.weights"]) == 1
    with pytest.raises(MismatchError, match="strict=True refuses others"):
        sampled(strict)
    caplog.clear()
    sampled(sg.compile(model, exe.plan, inputs(2), backend="eager"))
    assert len([record for record in caplog.records if "for other weights" in record.message]) == 1
    with pytest.raises(MismatchError, match="strict=True refuses others"):
        sg.compile(model, exe.plan, inputs(2), backend="eager", strict=True)


def test_plans_that_measured_nothing_follow_any_values():
    plan, other = compiled(tiny_dit()).plan, tiny_dit(seed=9)
    exe = sg.compile(other, plan, inputs(2), backend="eager", exact=True, strict=True)
    assert torch.equal(sampled(exe), sampled(other))


class Scaled(nn.Module):
    """Multiplies with a tensor that is neither a parameter nor a buffer, as caches of tables are."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base, self.tables = base, {"scale": torch.linspace(0.5, 2, width)}

    def forward(self, x: torch.Tensor, *arguments) -> torch.Tensor:
        return self.base(x, *arguments) * self.tables["scale"]


@pytest.mark.parametrize("how", ["in place", "through .data"])
def test_a_tensor_that_is_no_weight_is_watched_like_one(how):
    model = tiny_dit()
    block = model.transformer_blocks[0]
    block.attn1.to_v = Scaled(block.attn1.to_v, block.attn1.to_v.out_features).eval()
    plan = sg.make_plan("interval", model=model, scheduler=DDIM, steps=STEPS, every=1)
    exe = sg.compile(model, plan, inputs(2), backend="eager", exact=True)
    strict = sg.compile(model, plan.with_header(measured="choice"), inputs(2), backend="eager", exact=True, strict=True)
    scale = block.attn1.to_v.tables["scale"]
    assert any(tensor is scale for tensor in exe.weights.held)
    before = exe.session()(**inputs(2), return_dict=False)[0]
    (scale if how == "in place" else scale.data).mul_(1.5)
    with torch.no_grad():
        expected = model(**inputs(2), return_dict=False)[0]
    after = exe.session()(**inputs(2), return_dict=False)[0]
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)
    with pytest.raises(MismatchError, match="outside parameters and buffers"):
        strict.session()(**inputs(2))
    block.attn1.to_v.tables["scale"] = scale.clone()
    with pytest.raises(CompileError, match=r"to_v\.tables\['scale'\]"):
        exe.session()(**inputs(2))
