"""Sites of models without an adapter: found as adapters have them, refused where they could be one thing or another."""

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stepgraph as sg
from stepgraph.bench.deploy import zoo_images_a, zoo_images_b  # noqa: F401  # they register their classes
from stepgraph.bench.deploy.zoo_draws import build_tiny, draw_inputs
from stepgraph.compiler.marking.find_sites import find_sites
from stepgraph.compiler.marking.mark_sites import mark_sites
from stepgraph.compiler.models import family_of
from stepgraph.compiler.models.found import found_family
from stepgraph.compiler.tracing.trace import trace
from stepgraph.errors import ArgumentError, CompileError, PlanError


@pytest.mark.parametrize("name", ["DiT", "PixArt", "SD3", "Flux"])
def test_the_finder_finds_what_adapters_lay_down(name):
    class_name = f"{name}Transformer2DModel"
    model = build_tiny(class_name)
    traced = trace(model, draw_inputs(class_name, 1))
    adapted = mark_sites(traced, family_of(model)).sites
    found = mark_sites(traced, find_sites(found_family(class_name), traced, model)).sites
    # An adapter knows that a block is all that later ones read.
    assert [site for site in adapted if site.kind != "block"] == list(found)


class Attention(nn.Module):
    """Tokens x [B, N, 8] and, where they are given, the tokens [B, M, 8] that keys and values are made of."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x, y=None):
        k, v = self.kv(x if y is None else y)[:, None].chunk(2, -1)
        return self.out(F.scaled_dot_product_attention(self.q(x)[:, None], k, v)[:, 0])


class Doubtful(nn.Module):
    """Called like an attention, with one inside and a map of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.gate = Attention(), nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x) * self.gate(x).sigmoid()


class DoubtfulAttention(Doubtful):
    pass


class Wrapper(Doubtful):
    pass


class Block(nn.Module):
    """An attention, one across streams, and a feed-forward of the block's own maps."""

    def __init__(self, attention):
        super().__init__()
        self.attn, self.across, self.up, self.down = attention, Attention(), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, text, sound):
        x = x + self.attn(x)
        x = x + self.across(x, sound)
        return x + self.across(x, text) + self.down(F.gelu(self.up(x)))


class Toy(nn.Module):
    """Latents [B, N, 8] through two blocks, with a sound [B, 3, 8] that goes along and leaves beside them if it is `heard`."""

    def __init__(self, attention=Attention, heard=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(2))
        self.listen, self.heard = Attention(), heard

    def forward(self, hidden_states, timestep, text, audio_hidden_states):
        x, sound = hidden_states * timestep[:, None, None], audio_hidden_states
        for block in self.blocks:
            x = block(x, text, sound)
            sound = self.listen(sound, x)
        return (x, sound) if self.heard else (x,)


def toy_inputs(batch=2):
    return {"hidden_states": torch.randn(batch, 5, 8), "timestep": torch.rand(1).expand(batch),
            "text": torch.randn(batch, 4, 8), "audio_hidden_states": torch.randn(batch, 3, 8)}  # fmt: skip


def sites_of(model, **inputs):
    traced = trace(model.eval(), inputs or toy_inputs())
    return {site.name: site.kind for site in mark_sites(traced, find_sites(found_family("Toy"), traced, model)).sites}


def test_streams_calls_and_maps_of_a_blocks_own_are_told_apart():
    block = {"attn": "attn", "across": "modal_attn", "across#1": "cross_attn", "down": "ff"}
    wanted = {f"blocks.{number}.{name}": kind for number in range(2) for name, kind in block.items()}
    stack = {"hidden": "hidden", "stack_residual": "stack_residual", "output": "output"}
    assert sites_of(Toy()) == wanted | stack
    # A stored output of the stack stands for no more than itself where the sound leaves it too.
    assert sites_of(Toy(heard=True)) == wanted


def test_what_could_be_one_attention_or_another_is_refused_unless_it_is_pinned(monkeypatch):
    with pytest.raises(
        CompileError, match=r"can be blocks\.0\.attn or parts of it \(blocks\.0\.attn\.inner\).*pin DoubtfulAttention"
    ):
        sites_of(Toy(DoubtfulAttention))
    assert "blocks.0.attn.inner" in sites_of(Toy(Wrapper))
    for pinned, name in (("outer", "attn"), ("inner", "attn.inner")):
        monkeypatch.setattr("stepgraph.compiler.models.found.PINS", {"DoubtfulAttention": pinned})
        assert f"blocks.0.{name}" in sites_of(Toy(DoubtfulAttention))


@pytest.fixture(scope="module")
def planned():
    torch.manual_seed(0)
    model, scheduler = Toy().eval(), diffusers.FlowMatchEulerDiscreteScheduler()
    # In any order: the latents are those that the forward takes first.
    inputs = dict(reversed(toy_inputs(1).items()))
    return model, sg.make_plan("interval", model=model, scheduler=scheduler, steps=4, example_inputs=inputs, guidance="none")


def test_a_plan_of_found_sites_follows_another_batch(planned):
    model, plan = planned
    exe = sg.compile(model, plan, toy_inputs(3), backend="eager", exact=True)
    session, inputs = exe.session(), toy_inputs(3)
    with torch.no_grad():
        assert torch.equal(session(**inputs)[0], model(**inputs)[0])
    # At the next step all sites are reused, and what goes round them is not.
    following = toy_inputs(3)
    x = following["hidden_states"] * following["timestep"][:, None, None]
    with torch.no_grad():
        stack = model(**inputs)[0] - inputs["hidden_states"] * inputs["timestep"][:, None, None]
    torch.testing.assert_close(session(**following)[0], x + stack)
    with pytest.raises(PlanError, match=r"the plan is for text of shape \[batch, 4, 8\]; given is \[batch, 6, 8\]"):
        sg.compile(model, plan, toy_inputs() | {"text": torch.randn(2, 6, 8)})


def test_what_nobody_knows_of_a_class_is_asked_for(planned, monkeypatch):
    model, plan = planned
    with pytest.raises(CompileError, match=r"no adapter knows what Toy is called with; .*example_inputs="):
        sg.example_inputs(model)
    assert plan.header.timestep is None
    # What pipelines of diffusers' own classes make of the timestep differs from class to class.
    monkeypatch.setattr(Toy, "__module__", "diffusers.models")
    exe = sg.compile(model, plan, toy_inputs(), backend="eager")
    given = {name: value for name, value in toy_inputs().items() if name not in ("hidden_states", "timestep")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(
        ArgumentError, match=r"no adapter knows what pipelines make of the scheduler's timestep for Toy.*timestep="
    ):
        sg.sample(exe, scheduler, torch.randn(2, 5, 8), **given)
    told = plan.with_header(timestep=sg.make_plan(
        "full", model=model, scheduler=scheduler, steps=4, example_inputs=toy_inputs(), timestep=("/1000",)
    ).header.timestep)  # fmt: skip
    exe = sg.compile(model, told, toy_inputs(), backend="eager")
    assert torch.isfinite(sg.sample(exe, scheduler, torch.randn(2, 5, 8), **given)).all()


class Rotated(Toy):
    """Takes tables as pipelines give rotary embeddings: in a tuple, here with a list in it."""

    def forward(self, hidden_states, timestep, text, audio_hidden_states, tables):
        scaled = hidden_states * tables[0] + tables[1][0]
        return super().forward(scaled, timestep, text, audio_hidden_states)


def rotated_inputs():
    return toy_inputs() | {"tables": (torch.randn(5, 8), [torch.randn(5, 8), None])}


def test_an_artifact_keeps_inputs_that_lie_inside_containers(tmp_path):
    model, scheduler, inputs = Rotated().eval(), diffusers.FlowMatchEulerDiscreteScheduler(), rotated_inputs()
    plan = sg.make_plan("full", model=model, scheduler=scheduler, steps=2, example_inputs=inputs, guidance="none")
    assert plan.header.shapes["tables__1__0"] == (5, 8)
    exe = sg.compile(model, plan, inputs, backend="eager", exact=True)
    exe.save(tmp_path / "artifact")
    loaded, following = sg.load(tmp_path / "artifact", model), rotated_inputs()
    with torch.no_grad():
        assert torch.equal(loaded.session()(**following)[0], model(**following)[0])
    # Nothing was compiled anew for these inputs.
    assert len(loaded.programs) == 1
