"""Linear maps of one module that read one value are one product with the stacked weights, which follow the model's own."""

from collections import Counter
from dataclasses import replace

import diffusers
import pytest
import torch
from torch import Tensor, nn

import stepgraph as sg
from helpers.corrections import factors_of, maps_of, plan_of
from helpers.distance import SAME_RUN, error
from helpers.families import FLUX, flux_inputs, flux_plan
from helpers.pixart_sd3 import PIXART, SD3, pixart_inputs, planned, sd3_inputs
from helpers.tiny import TINY, inputs, noise, tiny_dit, tiny_scheduler
from stepgraph.compiler.lowering.lower import Lowered
from stepgraph.compiler.passes.program.merge_projections import merge_maps
from stepgraph.compiler.tracing.trace import trace
from stepgraph.packed_weights import PackedWeights
from stepgraph.runtime.program.packed_linear import PACKED, merged_linear, packs
from stepgraph.runtime.program.program import signature
from stepgraph.runtime.program.region_calls import GraphCall
from stepgraph.tolerances import OP, tolerance

needs_packing = pytest.mark.skipif(
    not packs(torch.zeros(1, 4), torch.zeros(4, 4)), reason="oneDNN's packed linear maps are not there"
)


def merged(exe: sg.Executable, given) -> tuple[sg.Executable, list[int]]:
    """An eager executable with its linear maps merged, which only compiled ones have, and how many there are per variant."""
    variants, counts = [], []
    for variant in exe.default.variants:
        counts.append(merge_maps(variant.graph, packs))
        variant.graph.recompile()
        variants.append(replace(variant, run=GraphCall(variant.graph.forward, exe.default.results)))
    program = replace(exe.default, variants=tuple(variants))
    return replace(exe, _default=program, _programs={signature(given): program}), counts


def parts_of(gm) -> list[int]:
    """How many linear maps each merged one is made of."""
    return [len(node.args[1]) for node in gm.graph.nodes if node.target is merged_linear]


def outputs(exe: sg.Executable, model, given) -> list[Tensor]:
    """The first output of each step at the scheduler's timesteps, and of the model itself where it is given in its place."""
    session = model or exe.session()
    dtype = given["timestep"].dtype
    scale = 1e-3 if isinstance(exe.model, diffusers.FluxTransformer2DModel) else 1
    times = [torch.full_like(given["timestep"], t * scale, dtype=dtype) for t in exe.plan.header.timesteps]
    with torch.no_grad():
        return [session(**{**given, "timestep": t}, return_dict=False)[0] for t in times]


def family(name: str):
    """A tiny model with its inputs and a plan that computes everything."""
    torch.manual_seed(0)
    if name == "dit":
        model, given = tiny_dit(), inputs(2)
        return model, given, plan_of(model, {"attn": "CC"})
    if name == "flux":
        model, given = diffusers.FluxTransformer2DModel(**FLUX).eval(), flux_inputs(2)
        return model, given, flux_plan(model, diffusers.FlowMatchEulerDiscreteScheduler(), {})
    kind, config = (diffusers.PixArtTransformer2DModel, PIXART) if name == "pixart" else (diffusers.SD3Transformer2DModel, SD3)
    model, given = kind(**config).eval(), (pixart_inputs if name == "pixart" else sd3_inputs)(2)
    return model, given, planned(model, given, {})


# Family -> maps per merged one, in the loop: text keys and values of PixArt's cross-attentions are hoisted. Of SD3's three
# blocks the first has a second attention to the image; FLUX has two double blocks and two single ones.
MERGED = {"dit": [3] * 2, "pixart": [3] * 2, "sd3": [3] * 7, "flux": [3] * (2 * FLUX["num_layers"] + FLUX["num_single_layers"])}


@needs_packing
@pytest.mark.parametrize("name", MERGED)
def test_maps_of_one_input_are_one_and_change_nothing_but_rounding(name):
    model, given, plan = family(name)
    exe, counts = merged(sg.compile(model, plan, given, backend="eager"), given)
    assert counts == [len(MERGED[name])]
    graph = exe.default.variants[0].graph
    assert parts_of(graph) == MERGED[name]
    assert not [n for n in graph.graph.nodes if str(n.target).endswith((".to_q", ".add_q_proj")) and "attn2" not in n.target]
    for found, expected in zip(outputs(exe, None, given), outputs(exe, model, given), strict=True):
        assert error(found, expected) < SAME_RUN


@needs_packing
def test_what_is_computed_once_a_prompt_is_merged_only_where_it_stays_in_the_loop():
    model, given, plan = family("pixart")
    exe, _ = merged(sg.compile(model, plan, given, backend="eager", hoist=False), given)
    assert parts_of(exe.default.variants[0].graph) == [3, 2] * PIXART["num_layers"]
    for found, expected in zip(outputs(exe, None, given), outputs(exe, model, given), strict=True):
        assert error(found, expected) < SAME_RUN


@needs_packing
def test_stored_maps_are_parts_of_the_product_and_keep_no_more_alive(dit):
    """Increments replace the maps in rows that correct them; rows that store them do so after the merged map."""
    plan, factors, given = plan_of(dit, {"attn": "CLCL"}), factors_of(dit, maps_of(dit)), inputs(2)
    single = sg.compile(dit, plan, given, backend="eager", factors=factors)
    wanted, session = [], single.session()
    bytes_held = []
    for t in plan.header.timesteps:
        wanted.append(session(**{**given, "timestep": torch.full((2,), int(t))}).sample)
        bytes_held.append(session.slot_bytes)
    exe, counts = merged(single, given)
    assert [counts[i] for i in exe.default.rows] == [2, 0, 2, 0]
    session = exe.session()
    for t, expected, held in zip(plan.header.timesteps, wanted, bytes_held, strict=True):
        assert error(session(**{**given, "timestep": torch.full((2,), int(t))}).sample, expected) < SAME_RUN
        assert session.slot_bytes == held
    assert max(bytes_held) > 0


@needs_packing
def test_compiled_regions_run_merged_maps_with_one_packed_copy_and_follow_the_weights(monkeypatch):
    model, packed = tiny_dit(), list[tuple[int, ...]]()

    def pack(weight: Tensor, made=PACKED.pack) -> Tensor:
        packed.append(tuple(weight.shape))
        return made(weight)

    monkeypatch.setattr(PACKED, "pack", pack)
    exe = sg.compile(model, plan_of(model, {"attn": "CC"}), inputs(2))
    assert parts_of(exe.default.variants[0].graph) == [3] * TINY["num_layers"]

    def run(runner) -> Tensor:
        return sg.sample(runner, tiny_scheduler("ddim"), noise(2), steps=exe.plan.steps, class_labels=torch.tensor([1, 2]))

    before, width = run(exe), TINY["num_attention_heads"] * TINY["attention_head_dim"]
    assert error(before, run(model)) < SAME_RUN
    # Of the four square weights of an attention, the output's alone is packed by itself; the head's is square here, too.
    assert Counter(packed)[3 * width, width] == TINY["num_layers"]
    assert Counter(packed)[width, width] == TINY["num_layers"] + 1
    packed.clear()
    attention = model.transformer_blocks[1].attn1
    with torch.no_grad():
        attention.to_v.weight.mul_(2)
        attention.to_v.bias.add_(1)
    after = run(exe)
    assert error(after, before) > 1e-3
    assert error(after, run(model)) < SAME_RUN
    assert packed == [(3 * width, width)]


@needs_packing
@pytest.mark.parametrize("option", ["merge", "prepack", "regions", "the pass"])
def test_maps_stay_apart_where_that_is_asked_or_weights_are_not_packed(option, monkeypatch):
    """Seen in the graphs alone: nothing is lowered."""
    lowered = Lowered([GraphCall(lambda *_: (), 1)])
    monkeypatch.setattr("stepgraph.compiler.pipeline.lower", lambda *_: lowered)
    model, given, plan = family("dit")
    assert parts_of(sg.compile(model, plan, given).default.variants[0].graph) == [3, 3]
    if option == "the pass":
        monkeypatch.setenv("STEPGRAPH_DISABLE_PASS", "merge_projections")
    options = {} if option == "the pass" else {option: False}
    assert parts_of(sg.compile(model, plan, given, **options).default.variants[0].graph) == []


class Maps(nn.Module):
    """Maps of one module, with what keeps them from being merged."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 4, bias=reason != "one bias")
        self.reason = reason
        if reason == "another kind of linear map":
            self.second = type("Other", (nn.Linear,), {})(8, 4)
        if reason == "other modules":
            self.second = nn.ModuleList([self.second])

    def forward(self, x: Tensor) -> Tensor:
        second = self.second[0] if self.reason == "other modules" else self.second
        one = self.first(x)
        if self.reason == "another input":
            x = x + 1
        if self.reason == "written input":
            x.add_(1)
        other = second(x)
        if self.reason == "written result":
            other.mul_(2)
        if self.reason == "a view of all tokens and channels":
            one = one.view(-1)[: x.shape[0]].view(-1, 1, 1)
        return one.sum(-1, keepdim=True) * other


@pytest.mark.parametrize(
    ("reason", "count"),
    [
        ("none", 1),
        ("one bias", 0),
        ("another kind of linear map", 0),
        ("other modules", 0),
        ("another input", 0),
        ("written input", 0),
        ("written result", 0),
        ("a view of all tokens and channels", 0),
    ],
)
def test_what_is_left_alone(reason, count):
    torch.manual_seed(0)
    model, x = Maps(reason).eval(), torch.randn(2, 3, 8)
    gm = trace(model, {"x": x}).bind(model)
    assert merge_maps(gm, lambda x, weight: True) == count
    gm.recompile()
    with torch.no_grad():
        assert error(gm(x.clone())[0], model(x.clone())) < SAME_RUN


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_merged_linear_map_is_the_linear_maps_side_by_side(dtype, bias):
    x, maps = torch.randn(2, 5, 24).to(dtype), [nn.Linear(24, width, bias=bias).to(dtype) for width in (40, 8, 17)]
    if not packs(x, maps[0].weight):
        pytest.skip("oneDNN does not take this dtype here")
    exact = torch.cat([m.double()(x.double()) for m in maps], -1)
    maps = [m.to(dtype) for m in maps]
    found = merged_linear(x, [m.weight for m in maps], [m.bias for m in maps] if bias else [])
    assert (found.dtype, found.shape) == (dtype, (2, 5, 65))
    assert error(found, exact) < tolerance(OP, dtype)


def test_a_packed_stack_follows_each_of_its_parts_and_goes_with_any():
    kept, parts = PackedWeights(lambda weight: weight * 2), [torch.ones(2, 3), torch.ones(1, 3)]
    assert kept.get(*parts) is kept.get(*parts)
    assert kept.get(*parts).tolist() == [[2.0] * 3] * 3
    parts[1].add_(1)
    assert kept.get(*parts)[:, 0].tolist() == [2, 2, 4]
    # A part by itself, and the parts in another order, are packed forms of their own.
    assert kept.get(parts[1]).tolist() == [[4.0] * 3]
    assert kept.get(*parts[::-1])[:, 0].tolist() == [4, 2, 2]
    assert (len(kept), kept.bytes) == (3, 4 * (9 + 3 + 9))
    del parts[0]
    assert (len(kept), kept.bytes) == (1, 4 * 3)
    parts.clear()
    assert (len(kept), kept.bytes) == (0, 0)
