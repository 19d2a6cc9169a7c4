"""The Triton kernels in Triton's interpreter, against float64; run by test_triton_kernels.py in a process of its own.

The interpreter is chosen when Triton is imported, for the whole process: TRITON_INTERPRET=1 python -m pytest this-file.
"""

import copy
import inspect

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.utils import _pytree as pytree
from triton.runtime import interpreter

from helpers.clocks import fake_clock
from helpers.distance import SAME_RUN, error
from helpers.lowrank_runs import OPERATIONS, run_glyph_dit
from helpers.op_checks import check_triton, lowrank_case, random
from stepgraph.ops import INTO, OPS
from stepgraph.tolerances import OP, tolerance
from stepgraph.triton_kernels import declines, projection
from stepgraph.triton_kernels import lowrank_delta as delta_file
from stepgraph.triton_kernels.launch import Machine
from stepgraph.triton_kernels.lowrank_tiles import row_block, takes_single

# The interpreter truncates where it casts to bfloat16.
DTYPES = list(OP)
FORMS = {"single": Machine(processors=1), "two": Machine(processors=132)}


def widened(handle):
    """The bits of bfloat16, which the interpreter keeps as uint16, as the float32 that they mean."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded_once(original, builder, a, b, d, *rest):
    """A product summed in float64 and rounded to what it is kept in: the bits of a CPU's library in float32 depend on the
    number of rows, a GPU's on none.
    """
    wide = (interpreter.TensorHandle(widened(handle).data.astype(np.float64), tl.float64) for handle in (a, b, d))
    summed = original(builder, *wide, *rest)
    return interpreter.TensorHandle(summed.data.astype(d.data.dtype), d.dtype.scalar)


@pytest.fixture(autouse=True, scope="session")
def _one_language():
    """The language as launches make it, made once: anew for every function that is called it takes a quarter of the time."""
    scopes = [interpreter._patch_lang(function.fn) for function in (product_kernel, tl.sum)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        yield
    for scope in reversed(scopes):
        scope.restore()


@pytest.fixture(autouse=True, scope="session")
def _bfloat16_products(_one_language):
    """Without this the interpreter multiplies bfloat16's bit patterns as integers, and says nothing."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot
    named = list(inspect.signature(original).parameters)
    assert named == ["self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"], "look at the patch again"
    assert product() != 4.0, "the interpreter has learned bfloat16; remove the patch"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", lambda self, a, b, *rest: rounded_once(original, self, a, b, *rest))
        assert product() == 4.0
        assert "computes wrongly" in declines.modulated_norm(*(torch.ones(1, 1, 8, dtype=torch.bfloat16) for _ in range(3)))
        patch.setattr(declines, "INTERPRETED", declines.DTYPES)
        yield


@triton.jit
def product_kernel(x_ptr, out_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x))


def product() -> float:
    """An element of the product of two matrices of halves [16, 16] in bfloat16: 4."""
    out = torch.empty(16, 16)
    product_kernel[(1,)](torch.full((16, 16), 0.5, dtype=torch.bfloat16), out)
    return out[0, 0].item()


@pytest.fixture(autouse=True)
def _only_triton(monkeypatch):
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "triton")


@pytest.fixture(autouse=True)
def _tuned():
    """Every kernel is tuned in every test, as on a device: candidates run on the same tensors one after the other."""
    with fake_clock():
        yield


@pytest.fixture(params=list(FORMS))
def form(request, monkeypatch) -> str:
    for file in (delta_file, projection):
        monkeypatch.setattr(file, "machine", lambda device: FORMS[request.param])
    return request.param


def padded(x: torch.Tensor) -> torch.Tensor:
    """The same values with rows that do not follow each other."""
    held = torch.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5), float("nan"), dtype=x.dtype)
    held[..., : x.shape[-2], : x.shape[-1]] = x
    return held[..., : x.shape[-2], : x.shape[-1]]


MODULATIONS = [(2, 70), (2, 1, 70), (1, 1, 70), (70,), (1, 9, 70), (2, 9, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MODULATIONS)
def test_modulated_norm(dtype, shape):
    x, scale, shift = random(2, 9, 70, dtype=dtype), random(*shape, dtype=dtype), random(2, 70, dtype=dtype)
    check_triton("modulated_norm", dtype, x, scale, shift)
    # Columns of one table of six, as adaLN makes them.
    table = random(2, 6 * 70, dtype=dtype)
    check_triton("modulated_norm", dtype, padded(x), *table.chunk(6, dim=-1)[2:4], 1e-5)


@pytest.mark.parametrize("channels", [1, 33, 1152, 4100])
def test_modulated_norm_widths(channels):
    shifted = random(3, 5, channels) + 3
    # One channel is normalised to zero: the shift is all there is.
    check_triton("modulated_norm", torch.float32, shifted, random(3, channels), random(3, channels), eps=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rank"), [((2, 33, 65), 20), ((40, 130), 1), ((1, 70, 256), 130), ((2, 3, 5, 96), 48)])
def test_lowrank_input(dtype, shape, rank, form):
    x, b = random(*shape, dtype=dtype), random(rank, shape[-1], dtype=dtype)
    p = check_triton("lowrank_input", dtype, x, b)
    assert p.dtype == torch.float32
    # Accumulated and kept in float32, whatever the inputs are.
    exact = x.double() @ b.double().T
    assert error(p, exact) < tolerance(OP, torch.float32)
    if len(shape) < 4:
        assert torch.equal(OPS["lowrank_input"](padded(x), b), p)


# Without tokens: as many as a tile has rows, so that the modulation of a tile is that of one batch.
CASES = [
    ((2, 33, 65), (20,), (70,)),
    ((1, 17, 40), (130,), (96,)),
    ((2, 0, 66), (48,), (66,)),
    ((1, 1, 40), (1,), (24,)),
    ((2, 9, 66), (20, 48, 1), (70, 64, 130)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("modulated", "gated"), [(False, False), (True, True)])
@pytest.mark.parametrize(("shape", "ranks", "columns"), CASES)
def test_lowrank_delta(dtype, form, shape, ranks, columns, modulated, gated):
    gated = gated and len(ranks) == 1
    batch, tokens, channels = shape
    shape = (batch, tokens or row_block(64, dtype, FORMS[form])[0], channels)
    args, unchanged, named = lowrank_case(shape, ranks, columns, dtype, modulated, gated)
    assert takes_single(shape[0] * shape[1], ranks, dtype, FORMS[form]) == (
        form == "single" and (dtype != torch.float32 or max(ranks) <= 64)
    )
    check_triton("lowrank_delta", dtype, *args, **named)
    (_, y, *rest) = args
    found = OPS["lowrank_delta"](unchanged, y, *rest, **named)
    # Nothing changed: the stored outputs to the last bit, or what the gate makes of them.
    wanted = [OPS["gated_residual"](named["residual"], [named["gate"]], y)] if gated else y
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowrank_delta_of_rows_apart(dtype, form):
    (x, y, *rest), _, named = lowrank_case((2, 33, 65), (20,), (70,), dtype, True, True)
    wanted = OPS["lowrank_delta"](x, y, *rest, **named)
    named["residual"] = padded(named["residual"])
    found = check_triton("lowrank_delta", dtype, padded(x), [padded(y[0])], *rest, **named)
    assert torch.equal(found[0], wanted[0])
    # Stored as [B, H, N, C] and read as [B, N, H, C] is no view that the kernels can walk.
    other = random(1, 8, 4, 65, dtype=dtype).transpose(1, 2)
    assert "not contiguous" in OPS["lowrank_input"].providers["triton"].declines(other, rest[2])


def test_lowrank_delta_at_full_rank_is_the_linear_map(form):
    weight, x, stored = random(48, 32), random(2, 40, 32), random(2, 40, 32)
    args = (x, [stored @ weight.T], OPS["lowrank_input"](stored, torch.eye(32)), [weight], torch.eye(32))
    torch.testing.assert_close(OPS["lowrank_delta"](*args)[0], x @ weight.T, rtol=1e-5, atol=1e-5)


def test_outputs_can_be_split(monkeypatch):
    args, _, _ = lowrank_case((2, 70, 64), (16, 20), (300, 70), torch.float16)
    seen, launch = [], delta_file.Launch
    monkeypatch.setattr(delta_file, "Launch", lambda *given, **named: (seen.append(given[3].block), launch(*given, **named))[1])
    for processors, splits in ((8, 1), (12, 2)):
        limits = Machine(processors)
        for file in (delta_file, projection):
            monkeypatch.setattr(file, "machine", lambda device, limits=limits: limits)
        with fake_clock(last=False):
            check_triton("lowrank_delta", torch.float16, *args)
        # What was fastest is put together last.
        assert seen[-1]["SPLITS"] == splits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_gated_residual(dtype, count):
    values = [random(2, 9, 70, dtype=dtype) for _ in range(count)]
    gates = [random(*MODULATIONS[i % len(MODULATIONS)], dtype=dtype) for i in range(count)]
    x = random(2, 9, 70, dtype=dtype)
    found = check_triton("gated_residual", dtype, x, gates, values)
    if count <= 8:
        assert torch.equal(OPS["gated_residual"](padded(x), gates, [padded(value) for value in values]), found)


@pytest.mark.parametrize("channels", [5, 128, 1152, 3000])
def test_gated_residual_widths(channels):
    check_triton("gated_residual", torch.float32, random(3, 7, channels), [random(3, channels)], [random(3, 7, channels)])
    rows = random(7, channels)
    check_triton("gated_residual", torch.float32, rows, [random(channels), random(7, channels)], [rows + 1, rows - 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize("per_channel", [False, True])
def test_linear_combination(dtype, count, constant, per_channel):
    values = [random(2, 9, 70, dtype=dtype) for _ in range(count)]
    coefficients = random(count + constant, *([70] if per_channel else []))
    found = check_triton("linear_combination", dtype, values, coefficients)
    assert torch.equal(OPS["linear_combination"]([padded(value) for value in values], coefficients), found)


def test_linear_combination_of_latents():
    values = [random(2, 4, 9, 9) for _ in range(3)]
    check_triton("linear_combination", torch.float32, values, random(4))
    check_triton("linear_combination", torch.float32, values, random(3, 9))
    check_triton("linear_combination", torch.float32, [random(5), random(5)], random(2))


CALLS = {
    "lowrank_input": lambda dtype: ((random(2, 33, 65, dtype=dtype), random(20, 65, dtype=dtype)), {}),
    "lowrank_delta": lambda dtype: lowrank_case((2, 19, 64), (20,), (140,), dtype, True, True)[::2],
    "modulated_norm": lambda dtype: ((random(2, 9, 70, dtype=dtype), *(random(2, 70, dtype=dtype) for _ in range(2))), {}),
    "gated_residual": lambda dtype: (
        (
            random(2, 9, 70, dtype=dtype),
            *([random(*shape, dtype=dtype) for _ in range(11)] for shape in ((2, 70), (2, 9, 70))),
        ),
        {},
    ),
    "linear_combination": lambda dtype: (([random(2, 9, 70, dtype=dtype) for _ in range(3)], random(4)), {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(OPS))
def test_a_first_call_is_the_same_however_often_candidates_run(monkeypatch, name, dtype):
    """Tuned, on its first call, as untuned: nothing that a candidate writes is read by another, or by the call itself."""
    args, named = CALLS[name](dtype)
    operator = OPS[name].choose(*args, **named).run
    wanted, timed = None, []
    for runs in (0, 1, 3):
        with fake_clock(runs, last=False) as ran:
            given = copy.deepcopy((args, named))
            results = pytree.tree_leaves(operator(*given[0], **given[1]))
        wanted = results if wanted is None else wanted
        assert all(torch.equal(one, other) for one, other in zip(results, wanted, strict=True))
        # Arguments are as they were.
        for one, other in zip(pytree.tree_leaves(given), pytree.tree_leaves((args, named)), strict=True):
            assert one is other or not isinstance(one, torch.Tensor) or torch.equal(one, other)
        timed.append(len(ran))
    assert len(set(timed)) == 1
    # Norms are not tuned, nor are products in float32, or of few rows.
    assert timed[0] > 0 or name in ("modulated_norm", "lowrank_input") or (dtype == torch.float32 and name == "lowrank_delta")


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("count", [1, 8, 11])
def test_a_result_may_be_written_over_what_is_read(runs, count):
    (x, gates, values), _ = CALLS["gated_residual"](torch.float32)
    gates, values = gates[:count], values[:count]
    wanted = OPS["gated_residual"].reference(x.double(), [g.double() for g in gates], [v.double() for v in values])
    operator = OPS["gated_residual"].choose(x, gates, values).run
    with fake_clock(runs):
        INTO[operator](x, gates, values, out=x)
    assert (x - wanted).norm() <= tolerance(OP, torch.float32) * wanted.norm()


def test_nothing_in_nothing_out():
    empty, row = torch.empty(2, 0, 8), random(2, 8)
    assert OPS["modulated_norm"](empty, row, row).shape == (2, 0, 8)
    assert OPS["gated_residual"](empty, [row], [empty]).shape == (2, 0, 8)
    assert OPS["linear_combination"]([empty], random(1)).shape == (2, 0, 8)
    p = OPS["lowrank_input"](empty, random(3, 8))
    assert OPS["lowrank_delta"](empty, [empty], p, [random(8, 3)], random(3, 8), row, row)[0].shape == (2, 0, 8)


def test_compiles_in_one_graph():
    (x, y, p, a, b), _, named = lowrank_case((2, 33, 65), (20, 16), (70, 65), torch.float32, True)
    delta = OPS["lowrank_delta"].choose(x, y, p, a, b, **named).run
    norm = OPS["modulated_norm"].choose(x, *named.values()).run

    def chain(x, first, second):
        changed = delta(norm(x * 2, *named.values()), [first, second + 1], p, a, b, **named)
        return [torch.relu(changed[0]), changed[1]]

    torch._dynamo.reset()
    found = torch.compile(chain, fullgraph=True, backend="aot_eager")(x, *y)
    assert all(torch.equal(one, other) for one, other in zip(found, chain(x, *y), strict=True))


def test_operators_agree_with_their_schemas():
    args, _, named = lowrank_case((2, 9, 33), (4, 5), (6, 7), torch.float32, True)
    for name, given, keywords in [
        ("lowrank_delta", args, named),
        ("lowrank_input", (args[0], args[4]), {}),
        ("modulated_norm", (args[0], *named.values()), {}),
        ("gated_residual", (args[0], [named["scale"]], [args[0]]), {}),
        ("linear_combination", ([args[0], args[0]], random(2)), {}),
    ]:
        operator = OPS[name].choose(*given, **keywords).run
        torch.library.opcheck(operator, given, keywords, test_utils=("test_schema", "test_faketensor"))


def test_a_whole_run_of_the_shipped_model(monkeypatch):
    """Two steps of a block of glyph-dit, the second of them corrected, with every operation in Triton."""
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "triton")
    drift, providers = run_glyph_dit(steps=2, layers=1)
    assert drift < SAME_RUN
    assert set(providers) == {f"{op} by triton" for op in OPERATIONS}
