"""Regions: equal pieces of a program's variants are compiled once, and calling them one after the other changes nothing."""

import pytest
import torch
from conftest import TINY, inputs, noise, tiny_dit, tiny_scheduler
from torch import Tensor, fx, nn

import stepgraph as sg
from stepgraph.compiler.lower import lower
from stepgraph.compiler.outline import cut
from stepgraph.config import CompileConfig, CompileError
from stepgraph.runtime.packed_linear import PACKED, packed_linear, packs

STEPS = 6


def compiled(model, *, every=2, batch=2, **options):
    plan = sg.make_plan("interval", model=model, scheduler=tiny_scheduler("ddim"), steps=STEPS, every=every)
    return sg.compile(model, plan, inputs(batch), **options)


def sampled(runner):
    return sg.sample(runner, tiny_scheduler("ddim"), noise(2), class_labels=torch.tensor([1, 2]))


def error(value, expected):
    return float((value - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def regions(dit):
    return compiled(dit)


def test_regions_are_shared_by_blocks_and_steps(dit, regions):
    """Before the blocks, a block that computes (all of them in every computing step), and the head; the reusing step has the
    tokens' part before the one pass over all sites."""
    program = regions.default
    computing, reusing = (program.variants[program.rows[step]].call for step in (0, 1))
    assert len(computing.calls) == 1 + TINY["num_layers"] + 1
    assert len(reusing.calls) == 3
    assert len({id(call.run) for call in computing.calls[1:-1]}) == 1
    assert computing.calls[0].run is reusing.calls[0].run
    assert computing.calls[-1].run is reusing.calls[-1].run
    assert program.regions == 3


def test_more_blocks_are_not_more_regions(regions):
    assert compiled(tiny_dit(num_layers=5)).default.regions == regions.default.regions


def test_regions_change_nothing_but_rounding(dit, regions):
    eager = sampled(compiled(dit, backend="eager"))
    assert error(sampled(regions), eager) < 1e-5
    assert error(sampled(compiled(dit, prepack=False)), eager) < 1e-5
    assert error(sampled(compiled(dit, regions=False)), eager) < 1e-5
    # A second run of the same executable finds no traces of the first.
    assert torch.equal(sampled(regions), sampled(regions))


def test_a_program_keeps_values_no_longer_than_they_are_read(regions):
    """Every register but arguments, weights and results is freed by the last call that reads it."""
    for variant in regions.default.variants:
        flat = variant.call
        for number, call in enumerate(flat.calls):
            later = {register for other in flat.calls[number + 1 :] for register in other.reads}
            assert set(call.frees) == set(call.reads) - later - set(flat.results)


def test_weights_are_used_by_reference(dit):
    model = tiny_dit(seed=3)
    exe = compiled(model, every=1)
    before = sampled(exe)
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight.mul_(2)
        model.proj_out_2.bias.add_(1)
    after = sampled(exe)
    assert error(after, before) > 1e-3
    assert (
        error(after, sg.sample(model, tiny_scheduler("ddim"), noise(2), steps=STEPS, class_labels=torch.tensor([1, 2]))) < 1e-5
    )


def test_other_shapes_are_refused(regions):
    call = regions.default.variants[0].call
    arguments = [torch.zeros(shape) for shape in call.shapes]
    arguments[0] = torch.zeros(3, 4, 8, 8)
    with pytest.raises(CompileError, match=r"compiled for arguments of the shapes .*; given are \[\(3, 4, 8, 8\)"):
        call(*arguments)


def test_other_batches_compile_regions_of_their_own(dit):
    exe = compiled(dit, batch=1)
    assert error(sampled(exe), sampled(compiled(dit, backend="eager"))) < 1e-5


class Blocks(nn.Module):
    """Two blocks whose outputs are two, with an operation that returns a tuple between them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 8) for _ in range(2))


def test_a_tuple_is_taken_apart_where_it_is_made():
    owner, graph = Blocks(), fx.Graph()

    def node(made, block, val):
        made.meta |= {"val": val, "nn_module_stack": {f"b{block}": (f"blocks.{block}", nn.Linear)}}
        return made

    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 4)
    wide = node(graph.call_module("blocks.0", (x,)), 0, torch.empty(2, 8))
    halves = node(graph.call_method("chunk", (wide, 2, 1)), 0, (torch.empty(2, 4), torch.empty(2, 4)))
    first = node(graph.call_function(__import__("operator").getitem, (halves, 0)), 0, torch.empty(2, 4))
    other = node(graph.call_module("blocks.1", (first,)), 1, torch.empty(2, 8))
    second = node(graph.call_function(__import__("operator").getitem, (halves, 1)), 1, torch.empty(2, 4))
    total = node(graph.call_method("sum", (second,)), 1, torch.empty(()))
    graph.output((other, total))
    gm = fx.GraphModule(owner, graph)
    pieces = cut(gm, lambda path: path.startswith("blocks."))
    assert [len(piece.nodes) for piece in pieces] == [4, 2]
    run = lower([gm], CompileConfig("inductor"), lambda path: path.startswith("blocks."))
    # The two blocks differ in what surrounds them.
    assert run.regions == 2
    given = torch.randn(2, 4)
    with torch.no_grad():
        for found, expected in zip(run.calls[0](given), gm(given), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 24), (24,)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_packed_linear_map_is_the_linear_map(dtype, shape, bias):
    x, linear = torch.randn(shape).to(dtype), nn.Linear(24, 40, bias=bias).to(dtype)
    if not packs(x, linear.weight):
        pytest.skip("oneDNN does not take this dtype here")
    expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    found = packed_linear(x, linear.weight, linear.bias)
    assert found.dtype == dtype
    assert error(found.double(), expected) < (1e-6 if dtype == torch.float32 else 8e-3)


@torch.no_grad()
def test_a_weight_is_packed_once_for_all_regions(monkeypatch):
    dit, packed = tiny_dit(), []

    def pack(weight: Tensor, made=PACKED.pack) -> Tensor:
        # Kept, so that no other stack of merged maps comes to lie where it was.
        packed.append(weight)
        return made(weight)

    monkeypatch.setattr(PACKED, "pack", pack)
    exe = compiled(dit, every=1)
    sampled(exe)
    assert len(packed) == len({weight.data_ptr() for weight in packed}) > 0
    before = len(packed)
    sampled(exe)
    sampled(compiled(dit, every=2))
    assert len(packed) == before
