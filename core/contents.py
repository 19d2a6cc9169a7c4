"""What a tensor holds, told by all of its bits or by some of its values: how a change of a weight is noticed."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from stepgraph.weight_kinds import PLAIN, inner_tensors

# How many values of a tensor are looked at where not all are.
VALUES = 256
# Words of 8 bytes that are mixed with a number each, and how many such rows are mixed at a time: what fits a processor's cache,
# and 64 MiB.
LANES, ROWS_OF_CPU, ROWS_OF_DEVICES = 2**16, 1, 128
# Odd, so that no product with it loses a bit: 2^64 over the golden ratio, as a signed number.
SPREAD = 0x9E3779B97F4A7C15 - 2**64
# Dtypes that every operation knows; others are looked at as bytes.
USUAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8)


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors of no further class that a tensor is made of: itself, or those inside a quantised one."""
    return [plain.detach() for plain in inner_tensors(tensor).values()]


def content_sums(tensors: Sequence[Tensor]) -> Tensor:
    """A digest of every tensor's bits, int64 [len(tensors)] on the tensors' device, which is not waited for.

    A word of 8 bytes is multiplied by an odd number of its place in its row of `LANES`, the product's upper half is mixed into
    the lower one, and rows are added up; their sums times odd numbers are added up again, all modulo 2^64: exact, whatever the
    order and however many rows are taken at a time, and the same on every device. Others are taken for the same by a chance
    of about 2^-64; if only the top bits of words differ (signs of every second float32), of about 2^-32. It is no protection
    against intent. Places count from the first tensor on: only digests of tensors of the same shapes and order compare. Beside
    the tensors it takes 128 MiB on a device and 1 MiB on a CPU, and a copy of one that is not contiguous.
    """
    pieces: list[Tensor] = []
    ends = []
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            for plain in plain_tensors(tensor):
                pieces += _row_sums(plain)
            ends.append(len(pieces))
        if not pieces:
            return torch.zeros(len(tensors), dtype=torch.int64)
        words = torch.cat(pieces)
        # Kept small: sums of sums up to a tensor's end, and what they grow by over a tensor.
        reached = torch.cumsum(words * _odd(len(words), words.device), 0)
        lengths = list(accumulate((len(piece) for piece in pieces), initial=0))
        last = _on_device(tuple(lengths[end] for end in ends), words.device)
        return torch.diff(torch.cat([reached.new_zeros(1), reached])[last], prepend=reached.new_zeros(1))


def content_sum(plain: Tensor) -> Tensor:
    """`content_sums` of a plain tensor alone, int64 [1]; not for the inside of a run: a small one on the CPU is read there."""
    if not _is_small(plain):
        return content_sums([plain])
    with torch.inference_mode(False), torch.no_grad():
        row = _small_row(plain.detach())
        return torch.from_numpy((row * _odd_numbers(len(row))).sum(keepdims=True))


@lru_cache(8)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers in a tensor; bringing them to a device would wait for it every time."""
    return torch.tensor(numbers, device=device)


def _odd(count: int, device: torch.device) -> Tensor:
    """Odd numbers, int64 [count], no two of them alike."""
    return torch.arange(1, count + 1, device=device) * SPREAD | 1


@lru_cache(8)
def _of_lanes(device: torch.device) -> Tensor:
    return _odd(LANES, device)


def _row_sums(tensor: Tensor) -> list[Tensor]:
    """A tensor's bits, int64 [...]: sums of mixed words row by row, and the bytes that are left."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    # Words can be read in place where the first lies at a multiple of their size.
    flat = flat.clone() if flat.storage_offset() % 8 else flat
    words, rest = flat[: flat.numel() // 8 * 8].view(torch.int64), flat[flat.numel() // 8 * 8 :]
    whole = len(words) // LANES
    at_once = ROWS_OF_CPU if tensor.device.type == "cpu" else ROWS_OF_DEVICES
    rows = words[: whole * LANES].view(whole, LANES)
    parts = [*rows.split(at_once), words[whole * LANES :].view(1, -1)] if whole else [words.view(1, -1)]
    work = words.new_empty(2, min(len(words), at_once * LANES))
    pieces = [_mixed(part, work) for part in parts if part.numel()]
    return [*pieces, *([rest.to(torch.int64)] if len(rest) else [])]


def _is_small(tensor: Tensor) -> bool:
    """Whether a tensor lies on the CPU and has no full row: there torch's operations cost more than what they do."""
    return tensor.device.type == "cpu" and 0 < tensor.nbytes < 8 * LANES


def _small_row(tensor: Tensor) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """What `_row_sums` gives of a small tensor, in one piece."""
    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    whole = len(flat) // 8 * 8
    products = flat[:whole].view(np.int64) * _odd_numbers(LANES)[: whole // 8]
    products ^= products >> 32
    sums = [products.sum(keepdims=True)] if whole else []
    return np.concatenate([*sums, flat[whole:].astype(np.int64)])


@lru_cache(16)
def _odd_numbers(count: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return _odd(count, torch.device("cpu")).numpy()


def _mixed(words: Tensor, work: Tensor) -> Tensor:
    """Sums of the rows of mixed words, int64 [rows]; `work` is written over."""
    products, shifted = (each[: words.numel()].view(words.shape) for each in work)
    torch.mul(words, _of_lanes(words.device)[: words.shape[1]], out=products)
    torch.bitwise_right_shift(products, 32, out=shifted)
    sums: Tensor = products.bitwise_xor_(shifted).sum(1)
    return sums


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
        self.look(tensors)

    def look(self, tensors: Sequence[Tensor]) -> list[int]:
        """See what has changed since the last look: numbers of the tensors of which a value is another one."""
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
                position
                for position, rows in enumerate(self._parts)
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
