"""What a tensor holds, told by all of its bits or by some of its values: how a change of a weight is noticed."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from stepgraph.weight_kinds import PLAIN, inner_tensors

# How many values of a tensor are looked at where not all are.
VALUES = 256
# Words of 8 bytes are added up in columns; a number of columns that no row of a matrix divides keeps its rows apart.
COLUMNS, ROWS = 1021, 256
# Odd, so that no product with it loses a bit: 2^64 over the golden ratio, as a signed number.
SPREAD = 0x9E3779B97F4A7C15 - 2**64
# Dtypes that every operation knows; others are looked at as bytes.
USUAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8)


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors of no further class that a tensor is made of: itself, or those inside a quantised one."""
    return [plain.detach() for plain in inner_tensors(tensor).values()]


def content_sums(tensors: Sequence[Tensor]) -> Tensor:
    """A digest of every tensor's bits, int64 [len(tensors)] on the tensors' device, which is not waited for.

    Words of 8 bytes are added up in columns of `ROWS`, the sums times odd numbers that depend on their place are added up
    again, all modulo 2^64: exact, whatever the order. A change of one word always shows. Changes of several are missed where
    they cancel: if words trade places that are a multiple of `COLUMNS` words apart, less than `ROWS` of these, and else by a
    chance of about 2^-64. It is no protection against intent. Places count from the first tensor on: only digests of tensors
    of the same shapes and order compare.
    """
    pieces: list[Tensor] = []
    ends = []
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            for plain in plain_tensors(tensor):
                pieces += _column_sums(plain)
            ends.append(len(pieces))
        if not pieces:
            return torch.zeros(len(tensors), dtype=torch.int64)
        words = torch.cat(pieces)
        # Kept small: sums of sums up to a tensor's end, and what they grow by over a tensor.
        reached = torch.cumsum(words * ((torch.arange(1, len(words) + 1, device=words.device) * SPREAD) | 1), 0)
        lengths = list(accumulate((len(piece) for piece in pieces), initial=0))
        last = _on_device(tuple(lengths[end] for end in ends), words.device)
        return torch.diff(torch.cat([reached.new_zeros(1), reached])[last], prepend=reached.new_zeros(1))


@lru_cache(8)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers in a tensor; bringing them to a device would wait for it every time."""
    return torch.tensor(numbers, device=device)


def _column_sums(tensor: Tensor) -> list[Tensor]:
    """A tensor's bits, int64 [...]: sums of stretches of the words, and what is left of them."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    # Words can be read in place where the first lies at a multiple of their size.
    flat = flat.clone() if flat.storage_offset() % 8 else flat
    whole = flat.numel() // 8
    words, rest = flat[: 8 * whole].view(torch.int64), flat[8 * whole :]
    stretches = whole // (COLUMNS * ROWS)
    first, rows = stretches * COLUMNS * ROWS, whole // COLUMNS
    pieces = [
        words[:first].view(stretches, ROWS, COLUMNS).sum(1).view(-1) if stretches else words[:0],
        words[first : rows * COLUMNS].view(-1, COLUMNS).sum(0)
        if rows * COLUMNS - first > COLUMNS
        else words[first : rows * COLUMNS],
        words[rows * COLUMNS :],
        rest.to(torch.int64) if len(rest) else words[:0],
    ]
    return [piece for piece in pieces if len(piece)]


@lru_cache(1024)
def _scattered(count: int) -> Tensor:
    """Places of VALUES of `count` values, int64, without any period that rows or columns could have; of fewer, all."""
    if count <= VALUES:
        return torch.arange(count)
    with torch.inference_mode(False):
        return torch.randint(count, (VALUES,), generator=torch.Generator().manual_seed(count))


class Scattered:
    """Some values of each of many tensors on the CPU, always the same ones, compared with those seen last.

    Args:
        tensors: Whose shapes and dtypes stay as they are; they are not held.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        shaped = [plain_tensors(tensor) for tensor in tensors]
        places = [[_scattered(plain.numel() * _bytes_each(plain)) for plain in parts] for parts in shaped]
        counts: dict[torch.dtype, int] = {}
        self._parts: list[list[tuple[Tensor, torch.dtype, int, int]]] = []
        for parts, indices in zip(shaped, places, strict=True):
            rows = []
            for plain, index in zip(parts, indices, strict=True):
                dtype = plain.dtype if plain.dtype in USUAL else torch.uint8
                start = counts.get(dtype, 0)
                counts[dtype] = start + len(index)
                rows.append((index, dtype, start, start + len(index)))
            self._parts.append(rows)
        with torch.inference_mode(False):
            self._seen = {dtype: torch.zeros(count, dtype=dtype) for dtype, count in counts.items()}
            self._now = {dtype: torch.zeros_like(seen) for dtype, seen in self._seen.items()}
        self._outs = [[(index, self._now[dtype][a:b]) for index, dtype, a, b in rows] for rows in self._parts]
        self.changed(tensors)

    def changed(self, tensors: Sequence[Tensor]) -> list[int]:
        """Numbers of the tensors of which a value is another one than at the last look."""
        with torch.inference_mode(False), torch.no_grad():
            for tensor, outs in zip(tensors, self._outs, strict=True):
                if type(tensor) in PLAIN and tensor.dtype in USUAL:
                    torch.take(tensor, outs[0][0], out=outs[0][1])
                    continue
                for plain, (index, out) in zip(plain_tensors(tensor), outs, strict=True):
                    usual = plain if plain.dtype in USUAL else plain.contiguous().view(-1).view(torch.uint8)
                    torch.take(usual, index, out=out)
            differ = {dtype for dtype in self._now if not _same_bits(self._now[dtype], self._seen[dtype])}
            if not differ:
                return []
            numbers = [
                number
                for number, rows in enumerate(self._parts)
                if any(
                    dtype in differ and not _same_bits(self._now[dtype][a:b], self._seen[dtype][a:b]) for _, dtype, a, b in rows
                )
            ]
            for dtype in differ:
                self._seen[dtype].copy_(self._now[dtype])
            return numbers


def _bytes_each(plain: Tensor) -> int:
    """How many values a tensor's element is looked at as."""
    return 1 if plain.dtype in USUAL else plain.element_size()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
