"""Digests and scattered values of tensors, against the bits themselves."""

import pytest
import torch

from stepgraph import contents
from stepgraph.contents import LANES, VALUES, Scattered, content_sum, content_sums

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int64,
    torch.bool,
    torch.uint16,
]
SIZES = [1, 7, 2045, LANES * 2, LANES * 5 + 11]


def filled(size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)


@pytest.mark.parametrize("size", SIZES)
def test_one_bit_shows_wherever_it_is(size):
    tensors = [filled(5), filled(size), filled(3)]
    before = content_sums(tensors)
    assert all(torch.equal(content_sum(tensor), content_sums([tensor])) for tensor in (*tensors, tensors[0][:0]))
    raw = tensors[1].view(torch.uint8)
    for place in {0, len(raw) // 3, len(raw) // 2, len(raw) - 1}:
        raw[place] ^= 128
        assert (content_sums(tensors) != before).tolist() == [False, True, False]
        raw[place] ^= 128
    assert torch.equal(content_sums(tensors), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_a_digest_and_values(dtype):
    tensor = filled(300).abs().to(dtype)
    before, some = content_sums([tensor]), Scattered([tensor])
    assert content_sum(tensor) == before
    tensor.view(torch.uint8).bitwise_xor_(1)
    assert content_sums([tensor]) != before
    assert some.look([tensor]) == [0]


def test_places_matter_and_memory_does_not():
    tensor = filled(300 * 400).reshape(300, 400)
    swapped = tensor.clone()
    swapped[[3, 9]] = tensor[[9, 3]]
    assert content_sums([tensor]) != content_sums([swapped])
    elsewhere = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].reshape(300, 400)
    assert content_sums([tensor]) == content_sums([elsewhere]) == content_sums([tensor.t().contiguous().t()])
    assert content_sums([]).shape == (0,)
    assert content_sums([tensor[:0]]).tolist() == [0]


def test_the_formula_and_the_amount_at_a_time(monkeypatch):
    tensors = [filled(9), filled(LANES * 5 + 11)]
    sums, modulus, piece = content_sums(tensors), 2**64, 0
    for tensor, digest in zip(tensors, sums.tolist(), strict=True):
        raw, expected = tensor.numpy().tobytes(), 0
        words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw) // 8 * 8, 8)]
        rows = [words[i : i + LANES] for i in range(0, len(words), LANES)]
        mixed = []
        for row in rows:
            products = [word * (((lane + 1) * contents.SPREAD) | 1) % modulus for lane, word in enumerate(row)]
            signed = [product - modulus if product >= modulus // 2 else product for product in products]
            mixed.append(sum(value ^ (value >> 32) for value in signed))
        for each in [*mixed, *raw[len(raw) // 8 * 8 :]]:
            piece += 1
            expected += each * ((piece * contents.SPREAD) | 1)
        assert digest % modulus == expected % modulus
    # The first by itself, as numpy has it.
    assert torch.equal(content_sum(tensors[0]), sums[:1])
    monkeypatch.setattr(contents, "ROWS_OF_CPU", 3)
    assert torch.equal(content_sums(tensors), sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8], ids=str)
def test_signs_show_however_many_and_wherever(dtype):
    tensor = (filled(96 * 320) * 40).to(dtype).reshape(96, 320)
    digest = content_sums([tensor])
    parts = [tensor[:2, 3:4], tensor[::2, 1:2], tensor[:, 3::4], tensor[:, 7:8], tensor[5:6], tensor, tensor[:, 1::2]]
    for part in parts:
        part.neg_()
        assert content_sums([tensor]) != digest
        part.neg_()
    assert content_sums([tensor]) == digest
    zeros = torch.zeros(64, 64)
    assert content_sums([zeros]) != content_sums([-zeros])


def test_small_tensors_are_looked_at_whole_and_large_ones_at_scattered_values():
    small, large = filled(VALUES), filled(64 * 96).reshape(64, 96)
    some = Scattered([small, large])
    small[VALUES - 1] += 1
    assert some.look([small, large]) == [0]
    # A block of an eighth of the rows, one of a third of the columns, a NaN that stays a NaN.
    for part in (large[24:32], large[:, 32:64]):
        part += 1e-3
        assert some.look([small, large]) == [1]
    large.fill_(float("nan"))
    assert some.look([small, large]) == [1]
    assert some.look([small, large]) == []


def test_what_a_tensor_subclass_holds_is_looked_at():
    class Pair(torch.Tensor):
        """Two tensors that stand for one."""

        @staticmethod
        def __new__(cls, one, other):
            pair = torch.Tensor._make_wrapper_subclass(cls, one.shape)
            pair.one, pair.other = one, other
            return pair

        def __tensor_flatten__(self):
            return ["one", "other"], None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError(func)

    pair = Pair(filled(4), filled(4, torch.int8))
    before, some = content_sums([pair]), Scattered([pair])
    pair.other[2] += 1
    assert content_sums([pair]) != before
    assert some.look([pair]) == [0]
