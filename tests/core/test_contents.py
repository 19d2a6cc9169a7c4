"""Digests and scattered values of tensors, against the bits themselves."""

import pytest
import torch

from stepgraph.contents import COLUMNS, ROWS, VALUES, Scattered, content_sums

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
SIZES = [1, 7, COLUMNS * 2 + 3, COLUMNS * 40, COLUMNS * ROWS * 4 + 11]


def filled(size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)


@pytest.mark.parametrize("size", SIZES)
def test_one_bit_shows_wherever_it_is(size):
    tensors = [filled(5), filled(size), filled(3)]
    before = content_sums(tensors)
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
    tensor.view(torch.uint8).bitwise_xor_(1)
    assert content_sums([tensor]) != before
    assert some.changed([tensor]) == [0]


def test_places_matter_and_memory_does_not():
    tensor = filled(300 * 400).reshape(300, 400)
    swapped = tensor.clone()
    swapped[[3, 9]] = tensor[[9, 3]]
    assert content_sums([tensor]) != content_sums([swapped])
    elsewhere = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].reshape(300, 400)
    assert content_sums([tensor]) == content_sums([elsewhere]) == content_sums([tensor.t().contiguous().t()])
    assert content_sums([]).shape == (0,)
    assert content_sums([tensor[:0]]).tolist() == [0]


def test_small_tensors_are_looked_at_whole_and_large_ones_at_scattered_values():
    small, large = filled(VALUES), filled(64 * 96).reshape(64, 96)
    some = Scattered([small, large])
    small[VALUES - 1] += 1
    assert some.changed([small, large]) == [0]
    # A block of an eighth of the rows, one of a third of the columns, a NaN that stays a NaN.
    for part in (large[24:32], large[:, 32:64]):
        part += 1e-3
        assert some.changed([small, large]) == [1]
    large.fill_(float("nan"))
    assert some.changed([small, large]) == [1]
    assert some.changed([small, large]) == []


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
    assert some.changed([pair]) == [0]
