"""The C++ providers: every operation at every instruction set this CPU runs, against the references in float64."""

import gc
import re
import shutil
from itertools import product

import pytest
import torch
from torch import Tensor

import stepgraph.csrc.lowrank as lowrank_module
from helpers.op_checks import assert_near_reference, random
from stepgraph.csrc.library import at_level, levels, native
from stepgraph.csrc.packed import PACKED, pack
from stepgraph.errors import OpError
from stepgraph.ops import OPS, gated_residual, linear_combination, load_providers, lowrank_delta, lowrank_input, modulated_norm
from stepgraph.packed_weights import PackedWeights

NEEDS_AVX2 = pytest.mark.skipif(native().level in ("none", "baseline"), reason="the providers need AVX2")

load_providers()


@pytest.fixture(autouse=True)
def _library():
    if not native().library and not (shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")):
        pytest.skip("no C++ compiler here, so no native library")
    assert not native().missing, f"{native().missing}; {native().advice}"


@pytest.fixture(params=levels() or ["none"])
def level(request):
    """Each level that runs here, and tiles computed in plain C++."""
    with at_level(request.param):
        yield request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["projects", "torch projects"])
def projects(request, monkeypatch):
    """Both ways to B x, whatever the sizes."""
    monkeypatch.setattr(lowrank_module, "projects", lambda *_: request.param)
    return request.param


def run(op, *args):
    """The C++ provider, with NaN wherever it does not write (see conftest.py)."""
    assert torch.empty(3).isnan().all()
    return op.providers["cpu"].run(*args)


def declined_for_size_alone(op, *args) -> bool:
    return op.providers["cpu"].declines(*args).split(" ", 1)[-1] in (
        "",
        "CPU has no AVX2",
        "elements are too few to gain from one pass",
    )


def check(op, *args, dtype: torch.dtype):
    """Run it, and compare with the reference in float64."""
    results = run(op, *args)
    assert_near_reference(op, results, dtype, *args)
    return results


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# -- elementwise -----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 7, 64), (1, 33, 208), (2, 5, 1153)]
BROADCAST = ["[B,C]", "[B,1,C]", "[1,1,C]", "[1,C]", "[B,N,C]"]


def modulation(kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    sizes = dict(zip("BNC", shape, strict=True), **{"1": 1})
    return random(*(sizes[letter] for letter in kind.strip("[]").split(",")), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_modulated_norm(level, dtype, shape):
    x, scale, shift = (
        random(*shape, dtype=dtype),
        random(shape[0], shape[2], dtype=dtype),
        random(shape[0], shape[2], dtype=dtype),
    )
    found = check(modulated_norm, x, scale, shift, 1e-5, dtype=dtype)
    assert found.shape == x.shape
    assert found.dtype == dtype


@pytest.mark.parametrize("kind", BROADCAST)
def test_modulations_are_broadcast(level, dtype, kind):
    shape = (3, 4, 40)
    x, scale, shift = random(*shape, dtype=dtype), modulation(kind, shape, dtype), modulation("[B,C]", shape, dtype)
    for op, args in ((modulated_norm, (x, scale, shift)), (gated_residual, (x, [scale], [random(*shape, dtype=dtype)]))):
        assert declined_for_size_alone(op, *args)
        check(op, *args, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_gated_residual(level, dtype, shape, count):
    values = [random(*shape, dtype=dtype) for _ in range(count)]
    gates = [random(shape[0], shape[2], dtype=dtype) for _ in range(count)]
    check(gated_residual, random(*shape, dtype=dtype), gates, values, dtype=dtype)


COMBINATIONS = list(product([*SHAPES, (7, 9), (2, 3, 4, 5)], (False, True), (False, True)))


@pytest.mark.parametrize(("shape", "constant", "per_channel"), COMBINATIONS)
def test_linear_combination(level, dtype, shape, constant, per_channel):
    values = [random(*shape, dtype=dtype) for _ in range(3)]
    rows = (3 + constant, shape[-1]) if per_channel else (3 + constant,)
    check(linear_combination, values, random(*rows), dtype=dtype)


def test_elementwise_operations_read_rows_where_they_are(level, dtype):
    storage = random(2, 6, 3, 48, dtype=dtype)
    x, other = storage[:, ::2, 1, :40], storage[:, 1::2, 2, 8:]
    gates = random(2, 80, dtype=dtype).chunk(2, dim=-1)
    assert not x.is_contiguous()
    assert not gates[0].is_contiguous()
    for op, args in (
        (modulated_norm, (x, *gates)),
        (gated_residual, (x, [gates[1], gates[0]], [other, x])),
        (linear_combination, ([x, other], random(2))),
    ):
        assert declined_for_size_alone(op, *args)
        assert check(op, *args, dtype=dtype).is_contiguous()


def test_nan_and_infinity_stay(level, dtype):
    x = torch.tensor([[[float("nan"), float("inf"), -float("inf"), 1.0, 0.0]]], dtype=dtype)
    found = run(gated_residual, x, [torch.ones(1, 5, dtype=dtype)], [torch.ones(1, 1, 5, dtype=dtype)])
    assert found.isnan().tolist() == [[[True, False, False, False, False]]]
    assert found[0, 0, 1:].tolist() == [float("inf"), -float("inf"), 2.0, 1.0]


def test_bfloat16_is_rounded_to_even(level):
    # One and a half units in the last place above and below numbers of which one is even.
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8)]).view(1, 1, 4)
    found = run(linear_combination, [torch.ones(1, 1, 4, dtype=torch.bfloat16)], x.view(1, 4))
    assert torch.equal(found, x.bfloat16())


# -- low rank --------------------------------------------------------------------------------------------------------------

RANKS = [[1], [20], [48], [130], [16, 3, 33]]
LOWRANK_SHAPES = [(1, 5, 7, 9), (2, 33, 65, 80), (3, 17, 208, 600)]


def maps(shape: tuple[int, int, int, int], ranks: list[int], dtype: torch.dtype):
    """x, stored outputs, A of each map and B of all."""
    batch, tokens, channels, outputs = shape
    x = random(batch, tokens, channels, dtype=dtype)
    y = [random(batch, tokens, outputs + i, dtype=dtype) for i in range(len(ranks))]
    a = [random(outputs + i, rank, dtype=dtype, scale=rank**-0.5) for i, rank in enumerate(ranks)]
    return x, y, a, random(sum(ranks), channels, dtype=dtype, scale=channels**-0.5)


def ends(x: Tensor, outputs: int):
    """Scale, shift, eps, gate and residual."""
    batch, tokens, channels = x.shape
    scale, shift, gate = (random(batch, size, dtype=x.dtype) for size in (channels, channels, outputs))
    return scale, shift, 1e-6, gate, random(batch, tokens, outputs, dtype=x.dtype)


def project(x: Tensor, b: Tensor, projects: bool) -> Tensor:
    return run(lowrank_input, x, b) if projects else lowrank_input.reference(x, b)


@pytest.mark.parametrize("shape", LOWRANK_SHAPES)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_lowrank_input(level, dtype, shape, ranks):
    x, _, _, b = maps(shape, ranks, dtype)
    found = check(lowrank_input, x, b, dtype=torch.float32)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("shape", LOWRANK_SHAPES)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_lowrank_delta(level, dtype, shape, ranks, projects):
    x, y, a, b = maps(shape, ranks, dtype)
    p = project(random(*x.shape, dtype=dtype), b, projects)
    check(lowrank_delta, x, y, p, a, b, dtype=dtype)
    scale, shift, eps, gate, residual = ends(x, shape[3])
    found = check(lowrank_delta, x, y, p, a, b, scale, shift, eps, dtype=dtype)
    assert [one.dtype for one in found] == [dtype] * len(ranks)
    if len(ranks) == 1:
        check(lowrank_delta, x, y, p, a, b, scale, shift, eps, gate, residual, dtype=dtype)
        check(lowrank_delta, x, y, p, a, b, None, None, eps, gate, residual, dtype=dtype)


@pytest.mark.parametrize("shape", LOWRANK_SHAPES)
@pytest.mark.parametrize("ranks", [[1], [48], [16, 3, 33]], ids=str)
def test_an_unchanged_input_gives_the_stored_outputs_to_the_last_bit(level, dtype, shape, ranks, projects):
    x, y, a, b = maps(shape, ranks, dtype)
    plain = run(lowrank_delta, x, y, project(x, b, projects), a, b)
    assert all(torch.equal(one, stored) for one, stored in zip(plain, y, strict=True))
    scale, shift, eps, gate, residual = ends(x, shape[3])
    p = project(run(modulated_norm, x, scale, shift, eps), b, projects)
    normalised = run(lowrank_delta, x, y, p, a, b, scale, shift, eps)
    assert all(torch.equal(one, stored) for one, stored in zip(normalised, y, strict=True))
    if len(ranks) == 1:
        found = run(lowrank_delta, x, y, p, a, b, scale, shift, eps, gate, residual)
        assert torch.equal(found[0], run(gated_residual, residual, [gate], y))


def test_equal_rows_give_equal_bits_wherever_they_stand(level, dtype, monkeypatch):
    monkeypatch.setattr("stepgraph.csrc.lowrank.projects", lambda x, b: True)
    x, _, _, b = maps((1, 101, 70, 50), [20], dtype)
    whole = run(lowrank_input, x, b)
    for first, last in ((0, 1), (7, 24), (96, 101)):
        assert torch.equal(run(lowrank_input, x[:, first:last], b), whole[:, first:last])


def test_low_rank_operations_read_rows_where_they_are(level, dtype, projects):
    storage, b = random(2, 18, 90, dtype=dtype), random(12, 40, dtype=dtype, scale=0.2)
    x, y, a = storage[:, ::2, :40], [storage[:, 1::2, 40:80]], [random(12, 40, dtype=dtype, scale=0.3).t()]
    p = random(2, 18, 16)[:, ::2, 2:14]
    assert check(lowrank_delta, x, y, p, a, b, dtype=dtype)[0].is_contiguous()
    if projects:
        check(lowrank_input, x, b, dtype=torch.float32)


@pytest.mark.parametrize("lead", [(11,), (2, 3, 4)])
def test_tensors_need_not_have_three_dimensions(level, dtype, lead, projects):
    x, y, b, a = (random(*size, dtype=dtype) for size in ((*lead, 40), (*lead, 24), (8, 40), (24, 8)))
    check(lowrank_delta, x, [y], project(x * 0.5, b, projects), [a], b, dtype=dtype)


def test_many_threads_give_the_same_bits(dtype, projects):
    x, y, a, b = maps((3, 301, 136, 200), [24, 8], dtype)
    scale, shift, _, gate, residual = ends(x, 200)
    cases = [
        (lowrank_delta, (x, y, lowrank_input.reference(x * 0.9, b), a, b, scale, shift)),
        (modulated_norm, (x, scale, shift)),
        (gated_residual, (residual, [gate], y[:1])),
        (linear_combination, ([x, x * 2], random(2))),
    ]
    one_thread = [run(op, *args) for op, args in cases]
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        five = [run(op, *args) for op, args in cases]
    finally:
        torch.set_num_threads(before)
    for found, expected in zip(five, one_thread, strict=True):
        pairs = zip(found, expected, strict=True) if isinstance(found, list) else [(found, expected)]
        assert all(torch.equal(*pair) for pair in pairs)


def test_no_rows_are_no_error(dtype):
    x, y, a, b = maps((1, 0, 16, 8), [4], dtype)
    p = run(lowrank_input, x, b)
    assert p.shape == (1, 0, 4)
    assert run(lowrank_delta, x, y, p, a, b)[0].shape == (1, 0, 8)


# -- packed weights --------------------------------------------------------------------------------------------------------


def test_weights_are_packed_once_and_again_when_written_to():
    kept, weight = PackedWeights(pack), random(20, 40)
    first = kept.get(weight)
    assert kept.get(weight) is first
    assert kept.get(weight.view(20, 40)) is first
    weight.mul_(2)
    second = kept.get(weight)
    assert torch.equal(second.view(torch.float32), first.view(torch.float32) * 2)
    assert len(kept) == 1
    assert kept.bytes == second.nbytes
    assert not torch.equal(kept.get(weight.t()), second)
    assert len(kept) == 2


def test_packed_weights_go_with_their_weights():
    kept, weight = PackedWeights(pack), random(20, 40)
    kept.get(weight)
    kept.get(weight[:8])
    view = weight[2:]
    del weight
    gc.collect()
    assert len(kept) == 2
    del view
    gc.collect()
    assert (len(kept), kept.bytes) == (0, 0)


def test_packed_weights_are_bounded():
    weights = [random(16, 16) for _ in range(4)]
    kept = PackedWeights(pack, limit=2 * pack(weights[0]).nbytes)
    for weight in weights:
        kept.get(weight)
    assert len(kept) == 2
    assert kept.bytes == kept.limit


def test_weights_of_inference_mode_are_not_kept():
    with torch.inference_mode():
        weight = random(16, 16)
        before = PACKED.get(weight)
        weight.mul_(3)
        assert torch.equal(PACKED.get(weight).view(torch.float32), before.view(torch.float32) * 3)


def test_a_correction_follows_its_weights(dtype):
    x, y, a, b = maps((1, 9, 64, 48), [16], dtype)
    p = torch.zeros(1, 9, 16)
    check(lowrank_delta, x, y, p, a, b, dtype=dtype)
    a[0].mul_(-1)
    b.add_(1)
    check(lowrank_delta, x, y, p, a, b, dtype=dtype)


# -- the registry ----------------------------------------------------------------------------------------------------------


@NEEDS_AVX2
def test_provider_is_chosen_by_size_and_dtype(monkeypatch):
    monkeypatch.delenv("STEPGRAPH_PROVIDERS", raising=False)
    large, small = random(1, 512, 1152), random(1, 2, 8)
    assert modulated_norm.choose(large, large[:, 0], large[:, 0]).name == "cpu"
    assert gated_residual.choose(small, [small[:, 0]], [small]).name == "reference"
    assert modulated_norm.choose(large.half(), large[:, 0].half(), large[:, 0].half()).name == "reference"
    assert modulated_norm.choose(large.double(), large[:, 0].double(), large[:, 0].double()).name == "reference"
    assert linear_combination.choose([large, large.bfloat16()], random(2)).name == "reference"


@NEEDS_AVX2
def test_the_choice_can_be_forced(monkeypatch):
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "cpu")
    x = random(1, 512, 1152)
    assert modulated_norm.choose(x, x[:, 0], x[:, 0]).name == "cpu"
    with pytest.raises(OpError, match=r"cpu declines \(torch.float16; takes torch.float32 and torch.bfloat16\)"):
        modulated_norm(x.half(), x[:, 0].half(), x[:, 0].half())
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "reference")
    assert modulated_norm.choose(x, x[:, 0], x[:, 0]).name == "reference"


@NEEDS_AVX2
@pytest.mark.parametrize(
    ("op", "args", "reason"),
    [
        (
            "modulated_norm",
            (random(2, 3, 8), random(3, 8), random(2, 8)),
            r"scale \[3, 8\] does not broadcast against \[2, 3, 8\]",
        ),
        ("modulated_norm", (random(2, 3, 8), random(2, 1), random(2, 8)), r"a modulation \[2, 1\] for"),
        (
            "modulated_norm",
            (random(2, 3, 8).to("meta"), random(2, 8), random(2, 8)),
            "tensors on cpu, meta; expected one device",
        ),
        ("gated_residual", (random(2, 3, 8), [random(2, 8)], []), "1 gates for 0 values"),
        ("gated_residual", (random(2, 3, 8), [], []), "0 gates for 0 values; expected .* at least one"),
        (
            "gated_residual",
            (random(2, 3, 8), [random(2, 8)], [random(1, 3, 8)]),
            r"a value is \[1, 3, 8\]; expected \[2, 3, 8\]",
        ),
        ("linear_combination", ([random(2, 8)], random(3)), r"coefficients \[3\] for 1 values"),
        ("linear_combination", ([random(2, 8)], random(1).double()), "coefficients are torch.float64; expected torch.float32"),
        ("lowrank_input", (random(2, 3, 8), random(4, 9)), r"b \[4, 9\] does not fit x \[2, 3, 8\]"),
        ("lowrank_input", (random(2, 3, 8), random(4, 8)), "torch's matrix product is faster"),
        (
            "lowrank_delta",
            (random(2, 3, 8), [random(2, 3, 6)], random(2, 3, 4), [random(6, 5)], random(4, 8)),
            r"a \[\[6, 5\]\]; .* add up to b's 4",
        ),
        (
            "lowrank_delta",
            (random(2, 3, 8), [random(2, 3, 6)], random(2, 3, 4).bfloat16(), [random(6, 4)], random(4, 8)),
            "p is torch.bfloat16; expected torch.float32",
        ),
        (
            "lowrank_delta",
            (random(2, 3, 8), [random(2, 3, 7)], random(2, 3, 4), [random(6, 4)], random(4, 8)),
            r"a stored output is \[2, 3, 7\]; expected \[2, 3, 6\]",
        ),
        (
            "lowrank_delta",
            (random(2, 3, 8), [random(2, 3, 6)], random(2, 3, 4), [random(6, 4)], random(4, 8), random(2, 8)),
            "only one of scale and shift is given",
        ),
    ],
)
def test_reasons_to_decline(op, args, reason):
    assert re.search(reason, OPS[op].providers["cpu"].declines(*args))


def test_nothing_is_taken_without_avx2():
    x = random(1, 512, 1152)
    with at_level("baseline"):
        assert OPS["modulated_norm"].providers["cpu"].declines(x, x[:, 0], x[:, 0]) == "the CPU has no AVX2"


def test_an_operation_compiles_without_a_graph_break():
    x, y, a, b = maps((2, 24, 64, 48), [16], torch.float32)
    scale, shift, eps, gate, residual = ends(x, 48)
    p = lowrank_input.reference(x * 0.7, b)
    args = (x, y, p, a, b, scale, shift, eps, gate, residual)

    def around(*args):
        return lowrank_delta.providers["cpu"].run(*args)[0] + 1

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), around(*args))


@NEEDS_AVX2
def test_channels_apart_are_put_side_by_side(monkeypatch):
    x, scale, shift = random(2, 64, 96).transpose(1, 2), random(2, 64), random(2, 64)
    chosen = modulated_norm.choose(x, scale, shift)
    assert chosen.name == "cpu"
    torch.testing.assert_close(chosen.run(x, scale, shift), modulated_norm.reference(x, scale, shift))


@NEEDS_AVX2
def test_a_forced_provider_is_not_asked_for_its_speed(monkeypatch):
    x, gate = random(1, 2, 4), random(1, 4)
    assert gated_residual.choose(x, [gate], [x]).name == "reference"
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "cpu")
    chosen = gated_residual.choose(x, [gate], [x])
    assert chosen.name == "cpu"
    torch.testing.assert_close(chosen.run(x, [gate], [x]), gated_residual.reference(x, [gate], [x]))
