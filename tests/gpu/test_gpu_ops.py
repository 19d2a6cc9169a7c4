"""The fused operations on a CUDA device: every Triton kernel against float64. Deselected by default; run with `-m gpu`."""

from functools import partial

import pytest
import torch

from helpers import op_checks
from helpers.op_checks import check_triton
from stepgraph.ops import OPS, forget_choices
from stepgraph.tolerances import OP
from stepgraph.triton_kernels import declines
from stepgraph.tuning import tuning

pytestmark = pytest.mark.gpu
DTYPES = list(OP)


@pytest.fixture(autouse=True)
def _only_triton(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "triton")


random = partial(op_checks.random, device="cuda")
lowrank_case = partial(op_checks.lowrank_case, device="cuda")


# Few rows (two kernels), many (one), split outputs, ragged sizes, maps of different ranks, a rank too high for one kernel.
CASES = [
    ((2, 256, 1152), (128,), (1152,)),
    ((2, 4096, 1152), (128,), (1152,)),
    ((1, 4096, 1536), (64,), (1536,)),
    ((1, 8192, 3072), (128,), (3072,)),
    ((3, 1111, 1000), (20,), (777,)),
    ((2, 4096, 1152), (128, 64, 20), (1152, 1152, 576)),
    ((2, 128, 1152), (96, 128, 48), (1152, 1152, 1152)),
    ((2, 4096, 1152), (256,), (4608,)),
    ((2, 4096, 1152), (300,), (1152,)),
    ((1, 1, 64), (1,), (64,)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("modulated", "gated"), [(False, False), (True, True)])
@pytest.mark.parametrize(("shape", "ranks", "columns"), CASES)
def test_lowrank_delta(dtype, shape, ranks, columns, modulated, gated):
    gated = gated and len(ranks) == 1
    args, unchanged, named = lowrank_case(shape, ranks, columns, dtype, modulated, gated)
    check_triton("lowrank_delta", dtype, *args, **named)
    (_, y, *rest) = args
    found = OPS["lowrank_delta"](unchanged, y, *rest, **named)
    # Nothing changed: the stored outputs to the last bit, whichever configs were chosen.
    wanted = [OPS["gated_residual"](named["residual"], [named["gate"]], y)] if gated else y
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "ranks", "columns"), CASES)
def test_what_a_modulated_correction_subtracts_is_what_was_stored(dtype, shape, ranks, columns):
    """One by one, what the two ways to B x have between: moments, the modulated x, and B x itself."""
    from stepgraph.triton_kernels.launch import as_rows
    from stepgraph.triton_kernels.projection import prepare_project, row_moments

    (_, _, p, _, b), x, named = lowrank_case(shape, ranks, columns, dtype, modulated=True)
    scale, shift = named["scale"], named["shift"]
    zeros = torch.zeros(shape[0], shape[2], device="cuda")
    # Mean and deviation: of float32 rows, unmodulated, the norm is (x - mean) * rstd to the bit.
    moments = row_moments(x.float(), 1e-6)
    found = OPS["modulated_norm"](x.float(), zeros, zeros)
    mean, rstd = moments.view(*as_rows(x).shape[:2], 2).unbind(-1)
    assert torch.equal(found, (x.float() - mean[..., None]) * rstd[..., None]), "moments"
    # The modulated x: with an identity for B, in the order of a product that has one term.
    identity = torch.eye(shape[2], dtype=dtype, device="cuda")[: min(64, shape[2])].contiguous()
    modulated = OPS["modulated_norm"](x, scale, shift)
    seen = torch.empty(*shape[:2], len(identity), dtype=torch.float32, device="cuda")
    prepare_project(x, identity, None, seen, scale, shift)(x, row_moments(x, 1e-6), scale, shift, identity, None, seen)
    assert torch.equal(seen, modulated[..., : len(identity)].float()), "modulated x"
    # B x of it, from memory and from registers.
    again = torch.empty_like(p)
    prepare_project(x, b, None, again, scale, shift)(x, row_moments(x, 1e-6), scale, shift, b, None, again)
    assert torch.equal(OPS["lowrank_input"](modulated, b), p), "B x is not repeatable"
    assert torch.equal(again, p), "B x"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [256, 4096, 16384])
@pytest.mark.parametrize("rank", [32, 64, 128, 256])
def test_every_config_cancels(monkeypatch, dtype, rows, rank):
    """Whatever is chosen among the configs for p, for the update and for its halves, an unchanged input changes nothing."""
    from stepgraph.triton_kernels import launch, lowrank_delta, projection

    def take(index):
        launch.forget()
        for file in (lowrank_delta, projection):
            monkeypatch.setattr(
                file, "fastest", lambda key, candidates, make, trial: make(candidates[index % len(candidates)])
            )  # fmt: skip

    (_, y, p, a, b), x, _ = lowrank_case((1, rows, 1152), (rank,), (1152,), dtype)
    # More than there are configs in any table.
    for index in range(8):
        take(index)
        assert torch.equal(OPS["lowrank_input"](x, b), p)
        assert torch.equal(OPS["lowrank_delta"](x, y, p, a, b)[0], y[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4096, 1152), (1, 4608, 3072), (2, 77, 1000), (3, 5, 33), (1, 16, 12288)])
def test_modulated_norm(dtype, shape):
    x, table = random(*shape, dtype=dtype), random(shape[0], 6 * shape[2], dtype=dtype)
    check_triton("modulated_norm", dtype, x, *table.chunk(6, dim=-1)[2:4])
    check_triton("modulated_norm", dtype, x[:, ::2], random(*shape[::2], dtype=dtype)[:, None], table[:1, None, : shape[2]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 8, 11])
@pytest.mark.parametrize("shape", [(2, 4096, 1152), (1, 4608, 3072), (2, 77, 1000)])
def test_gated_residual(dtype, count, shape):
    values = [random(*shape, dtype=dtype) for _ in range(count)]
    gates = [random(shape[0], shape[2], dtype=dtype) for _ in range(count)]
    check_triton("gated_residual", dtype, random(*shape, dtype=dtype), gates, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_linear_combination(dtype, count):
    for shape in [(2, 4096, 1152), (2, 4, 64, 64), (2, 77, 1000)]:
        values = [random(*shape, dtype=dtype) for _ in range(count)]
        for coefficients in (random(count), random(count + 1), random(count, shape[-1]), random(count + 1, shape[-1])):
            check_triton("linear_combination", dtype, values, coefficients)


def test_addresses_beyond_32_bits():
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    x = torch.ones(1, 2_200_000, 1024, dtype=torch.bfloat16, device="cuda")
    row = torch.ones(1, 1024, dtype=torch.bfloat16, device="cuda")
    assert bool((OPS["gated_residual"](x, [row], [x])[0, -1] == 2).all())
    # A constant row is normalised to zero, and the shift is left.
    assert bool((OPS["modulated_norm"](x, row, row)[0, -1] == 1).all())


def test_what_was_fastest_is_kept(monkeypatch):
    from stepgraph.triton_kernels import launch

    launch.forget()
    args, _, _ = lowrank_case((2, 4096, 1152), (128,), (1152,), torch.bfloat16)
    OPS["lowrank_delta"](*args)
    assert launch._fastest == {}
    with tuning():
        OPS["lowrank_delta"](*args)
    kept = {key[0]: config for key, config in launch._fastest.items()}
    assert {"project", "delta"} >= set(kept) >= {"delta"}
    count = len(launch._fastest)
    monkeypatch.setattr(launch, "clock", lambda run: pytest.fail("measured twice"))
    with tuning():
        OPS["lowrank_delta"](*args)
    assert len(launch._fastest) == count


def test_captured_in_a_graph():
    args, _, named = lowrank_case((2, 256, 1152), (128,), (1152,), torch.bfloat16, True, True)
    wanted = OPS["lowrank_delta"](*args, **named)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = OPS["lowrank_delta"](*args, **named)
    found[0].fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found[0], wanted[0])


def test_compiles_in_one_graph():
    (x, y, p, a, b), _, named = lowrank_case((2, 512, 384), (48, 16), (384, 128), torch.bfloat16, True)
    delta = OPS["lowrank_delta"].choose(x, y, p, a, b, **named).run
    norm = OPS["modulated_norm"].choose(x, *named.values()).run

    def chain(x, first, second):
        return delta(norm(x, *named.values()), [first, second], p, a, b, **named)

    torch._dynamo.reset()
    found = torch.compile(chain, fullgraph=True)(x, *y)
    assert all(torch.equal(one, other) for one, other in zip(found, chain(x, *y), strict=True))


def test_the_providers_are_asked_in_order(monkeypatch):
    monkeypatch.delenv("STEPGRAPH_PROVIDERS")
    x, row = random(2, 5, 64), random(2, 64)
    assert OPS["modulated_norm"].choose(x, row, row).name == "triton"
    assert OPS["modulated_norm"].choose(x.double(), row.double(), row.double()).name == "reference"
    monkeypatch.setattr(declines, "_capability", lambda device: (7, 5))
    forget_choices()
    if torch.version.hip is None:
        assert OPS["modulated_norm"].choose(x, row, row).name == "reference"
