"""Regions: equal pieces of a program's variants are compiled once, and calling them one after the other changes nothing."""

from itertools import combinations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import stepgraph as sg
from helpers.distance import SAME_RUN, error
from helpers.tiny import TINY, inputs, noise, tiny_dit, tiny_scheduler
from stepgraph.compiler.lowering import region_cache
from stepgraph.compiler.lowering.cut import cut
from stepgraph.compiler.lowering.lift_region import lift_region
from stepgraph.compiler.lowering.lower import lower
from stepgraph.config import CompileConfig
from stepgraph.errors import CompileError
from stepgraph.runtime.memory.arena import Arena
from stepgraph.runtime.program.packed_linear import PACKED, packed_linear, packs
from stepgraph.tolerances import OP, tolerance

STEPS = 6


def compiled(model, *, every=2, batch=2, **options):
    plan = sg.make_plan("interval", model=model, scheduler=tiny_scheduler("ddim"), steps=STEPS, every=every)
    return sg.compile(model, plan, inputs(batch), **options)


def sampled(runner):
    return sg.sample(runner, tiny_scheduler("ddim"), noise(2), class_labels=torch.tensor([1, 2]))


@pytest.fixture(scope="module")
def regions(dit):
    return compiled(dit)


@pytest.mark.slow
def test_regions_are_shared_by_blocks_and_steps(dit, regions):
    """Before the blocks, a block that computes (all of them in every computing step), and the head; the reusing step has the
    tokens' part before the one pass over all sites."""
    program = regions.default
    computing, reusing = (program.variants[program.rows[step]].run for step in (0, 1))
    assert len(computing.calls) == 1 + TINY["num_layers"] + 1
    assert len(reusing.calls) == 3
    assert len({id(call.run) for call in computing.calls[1:-1]}) == 1
    assert computing.calls[0].run is reusing.calls[0].run
    assert computing.calls[-1].run is reusing.calls[-1].run
    assert program.regions == 3


def test_more_blocks_are_not_more_regions(regions):
    assert compiled(tiny_dit(num_layers=3)).default.regions == regions.default.regions


@pytest.mark.slow
def test_regions_change_nothing_but_rounding(dit, regions):
    eager = sampled(compiled(dit, backend="eager"))
    assert error(sampled(regions), eager) < SAME_RUN
    assert error(sampled(compiled(dit, prepack=False)), eager) < SAME_RUN
    assert error(sampled(compiled(dit, regions=False)), eager) < SAME_RUN
    # A second run of the same executable finds no traces of the first.
    assert torch.equal(sampled(regions), sampled(regions))


def test_activations_overlap_with_nothing_that_is_still_read(regions):
    """From the call that writes a register of the work area to the last that reads it, its bytes are its own."""
    for variant in regions.default.variants:
        run = variant.run
        first = len(run.shapes) + len(run.weights)
        lives = []
        for register, place in enumerate(run.work, start=first):
            made = next(i for i, call in enumerate(run.calls) if register in call.writes)
            read = [i for i, call in enumerate(run.calls) if register in call.reads]
            lives.append((place.offset, place.offset + place.nbytes, made, max(read, default=made)))
            assert place.offset + place.nbytes <= run.work_bytes <= regions.default.layout.work_bytes
        assert lives
        for one, other in combinations(lives, 2):
            assert one[1] <= other[0] or other[1] <= one[0] or one[3] < other[2] or other[3] < one[2]


def test_two_activations_suffice_for_a_chain_of_blocks(regions):
    """A block reads the tokens and writes the next ones; the blocks' own stores go to slots."""
    tokens = 2 * 16 * TINY["num_attention_heads"] * TINY["attention_head_dim"] * 4
    assert regions.default.layout.work_bytes == 2 * tokens


def test_weights_are_used_by_reference(dit):
    model = tiny_dit(seed=3)
    exe = compiled(model, every=1)
    before = sampled(exe)
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight.mul_(2)
        model.proj_out_2.bias.add_(1)
    after = sampled(exe)
    assert error(after, before) > 1e-3
    expected = sg.sample(model, tiny_scheduler("ddim"), noise(2), steps=STEPS, class_labels=torch.tensor([1, 2]))
    assert error(after, expected) < SAME_RUN


def test_writes_that_torch_does_not_count_need_a_word():
    model = tiny_dit(seed=4)
    exe = compiled(model, every=1)
    before = sampled(exe)
    model.transformer_blocks[0].ff.net[2].weight.data.mul_(3)
    exe.repack()
    expected = sg.sample(model, tiny_scheduler("ddim"), noise(2), steps=STEPS, class_labels=torch.tensor([1, 2]))
    assert error(sampled(exe), expected) < SAME_RUN < error(before, expected)


def test_other_shapes_are_refused(regions):
    run = regions.default.variants[0].run
    arguments = [torch.zeros(shape) for shape in run.shapes]
    arguments[0] = torch.zeros(3, 4, 8, 8)
    with pytest.raises(CompileError, match=r"compiled for arguments of the shapes .*; given are \[\(3, 4, 8, 8\)"):
        run(arguments, [], Arena.of(0, arguments[0].device))


@pytest.mark.slow
def test_other_batches_compile_regions_of_their_own(dit):
    exe = compiled(dit, batch=1)
    assert error(sampled(exe), sampled(compiled(dit, backend="eager"))) < SAME_RUN


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
    run = lower([gm], CompileConfig("inductor"), lambda path: path.startswith("blocks."), 2)
    # The two blocks differ in what surrounds them.
    assert run.regions == 2
    given = torch.randn(2, 4)
    with torch.no_grad():
        arena = Arena.of(run.runs[0].work_bytes, given.device)
        for found, expected in zip(run.runs[0]([given], [], arena), gm(given), strict=True):
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
    assert error(found.double(), expected) < tolerance(OP, dtype)


class Activated(nn.Module):
    """A linear map and an activation."""

    def __init__(self, activation):
        super().__init__()
        self.linear, self.activation = nn.Linear(24, 40), activation

    def forward(self, x):
        return self.activation(self.linear(x)) + 1


@pytest.mark.parametrize(
    ("activation", "reference", "fused"),
    [
        (nn.GELU(), lambda y: y * (1 + torch.erf(y / 2**0.5)) / 2, "gelu"),
        (lambda y: nn.functional.gelu(y, approximate="tanh"),
         lambda y: y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))) / 2, "gelu_tanh"),
        (nn.SiLU(), lambda y: y / (1 + torch.exp(-y)), "silu"),
        (nn.ReLU(), lambda y: y.clamp_min(0), None),
    ],
)  # fmt: skip
@torch.no_grad()
def test_activations_are_applied_by_the_linear_map(activation, reference, fused):
    owner = Activated(activation)
    x = torch.randn(2, 5, 24)
    gm = fx.GraphModule(owner, fx.Tracer().trace(owner))
    ShapeProp(gm).propagate(x)
    for node in gm.graph.nodes:
        node.meta["val"] = torch.empty(node.meta["tensor_meta"].shape) if "tensor_meta" in node.meta else None
    (piece,) = cut(gm, lambda path: False)
    region = lift_region(gm, piece, prepack=True)
    before = str(region.graph)
    finished = region.writing({len(piece.nodes) - 1})
    assert str(region.graph) == before
    packed = [node for node in finished.graph.nodes if node.target is packed_linear]
    assert [node.args[3:] for node in packed] == ([(fused,)] if fused else [()])
    out = torch.empty(2, 5, 40)
    finished(x, *region.weights, out)
    y = nn.functional.linear(x.double(), owner.linear.weight.double(), owner.linear.bias.double())
    assert error(out.double(), reference(y) + 1) < tolerance(OP, torch.float32)


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
    assert len(packed) == before
    # A compilation takes no copy on trust: a write through `.data` may have come between. The new ones serve both.
    other = compiled(dit, every=2)
    sampled(other)
    sampled(exe)
    sampled(other)
    assert len(packed) == 2 * before


def test_regions_that_inductor_tunes_compute_the_same(dit, regions, monkeypatch):
    asked, compile_kept = [], region_cache.compile_kept
    monkeypatch.setattr(
        region_cache, "compile_kept", lambda gm, given, patches: (asked.append(patches), compile_kept(gm, given, patches))[1]
    )
    tuned = compiled(dit, max_autotune=True)
    assert asked == [{"max_autotune": True}] * tuned.default.regions
    assert error(sampled(tuned), sampled(regions)) < SAME_RUN
