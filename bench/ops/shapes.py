"""The shapes that fused operations meet in full-size models, and arguments of those shapes."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepgraph.ops import OPS, Op, rows


@dataclass(frozen=True)
class Shape:
    """Tokens and widths of one model at one resolution, as one evaluation of a guided batch sees them."""

    name: str
    batch: int
    tokens: int
    channels: int
    hidden: int


SHAPES = (
    Shape("glyph-dit", 16, 36, 128, 512),
    Shape("dit-xl-2-256", 2, 256, 1152, 4608),
    Shape("dit-xl-2-512", 2, 1024, 1152, 4608),
    Shape("pixart-1024", 2, 4096, 1152, 4608),
    Shape("sd3-1024", 2, 4096, 1536, 6144),
    Shape("flux-1024", 1, 4096, 3072, 12288),
)
RANKS = (64, 128, 256)


@dataclass(frozen=True)
class Case:
    """One operation on arguments of one shape.

    Attributes:
        op: The operation.
        name: Of the case: form, shape and rank.
        arguments: Of the operation.
        torch: The same in plain torch operations of the model's dtype, as one would write it without this package.
        full: What is saved: the linear maps themselves, with the same normalisation and gate; None for the other operations.
        moved: Bytes that have to be read and written at least once.
        flops: Floating-point operations of the matrix products.
    """

    op: Op
    name: str
    arguments: Mapping[str, Any]
    torch: Callable[[], Any]
    full: Callable[[], Any] | None
    moved: int
    flops: int

    def run(self, provider: str) -> Any:
        """One call by a provider."""
        return self.op.providers[provider].run(**self.arguments)


def cases(
    shape: Shape, dtype: torch.dtype, device: str, ops: Collection[str] = (), forms: Collection[str] = ()
) -> Iterator[Case]:
    """The cases of a shape: every operation of the registry, and of the low-rank ones every form and rank.

    Args:
        shape: Tokens and widths.
        dtype: Of the arguments.
        device: Where they lie.
        ops: Only these operations; all where empty.
        forms: Only these forms of `lowrank_delta`; all where empty.
    """
    builders: dict[str, Callable[[Op, Shape, _Maker], Iterator[Case]]] = {
        "lowrank_input": _inputs, "lowrank_delta": partial(_deltas, only=forms), "modulated_norm": _norms,
        "gated_residual": _residuals,
        "linear_combination": _combinations,
    }  # fmt: skip
    missing = sorted(set(OPS) - set(builders))
    if missing:
        raise SystemExit(f"the operation {missing[0]} has no benchmark; add its cases to bench/ops/shapes.py")
    for name, build in builders.items():
        if not ops or name in ops:
            yield from build(OPS[name], shape, _Maker(shape, dtype, device))


class _Maker:
    """Random tensors of a shape."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def random(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(size, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.dtype)

    def tokens(self, channels: int | None = None) -> Tensor:
        return self.random(self.shape.batch, self.shape.tokens, channels or self.shape.channels)

    def modulation(self, channels: int | None = None) -> Tensor:
        return self.random(self.shape.batch, 1, channels or self.shape.channels, scale=0.1)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _inputs(op: Op, shape: Shape, make: _Maker) -> Iterator[Case]:
    for rank in RANKS:
        if rank <= shape.channels:
            x, b = make.tokens(), make.random(rank, shape.channels, scale=shape.channels**-0.5)
            flops = 2 * shape.batch * shape.tokens * b.numel()
            moved = _bytes(x, b) + 4 * shape.batch * shape.tokens * rank
            yield Case(op, f"{shape.name} r{rank}", {"x": x, "b": b}, partial(_projected, x, b), None, moved, flops)


def _projected(x: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, b).float()


def _deltas(op: Op, shape: Shape, make: _Maker, only: Collection[str] = ()) -> Iterator[Case]:
    """Square maps plain and between a norm and a gate; q, k and v; into and out of the feed-forward."""
    wide, narrow = shape.hidden, shape.channels
    forms = {
        "square": (narrow, (narrow,), False), "ada": (narrow, (narrow,), True), "qkv": (narrow, (narrow,) * 3, False),
        "fc1": (narrow, (wide,), False), "fc2": (wide, (narrow,), False),
    }  # fmt: skip
    for form, (c_in, c_out, ada) in forms.items():
        for rank in RANKS:
            if rank <= narrow and (not only or form in only):
                yield _delta(op, f"{form} {shape.name} r{rank}", make, c_in, c_out, rank, ada)


def _delta(op: Op, name: str, make: _Maker, c_in: int, c_out: tuple[int, ...], rank: int, ada: bool) -> Case:
    x, y = make.tokens(c_in), [make.tokens(width) for width in c_out]
    b = make.random(rank * len(c_out), c_in, scale=c_in**-0.5)
    a = [make.random(width, rank, scale=rank**-0.5) for width in c_out]
    stored = make.tokens(c_in)
    weights = [make.random(width, c_in, scale=c_in**-0.5) for width in c_out]
    scale, shift, gate, residual = make.modulation(c_in), make.modulation(c_in), make.modulation(), make.tokens(c_out[0])
    p, low = OPS["lowrank_input"].reference(stored, b), F.linear(stored, b)
    arguments = {"x": x, "y": y, "p": p, "a": a, "b": b}
    if ada:
        arguments |= {"scale": scale, "shift": shift, "gate": gate, "residual": residual}

    def before() -> Tensor:
        return F.layer_norm(x, (c_in,), None, None, 1e-6) * (1 + scale) + shift if ada else x

    def behind(values: list[Tensor]) -> list[Tensor]:
        return [residual + gate * value for value in values] if ada else values

    def plain() -> list[Tensor]:
        delta = (F.linear(before(), b) - low).split(rank, dim=-1)
        flat = [torch.addmm(s.flatten(0, 1), d.flatten(0, 1), w.T).view(s.shape) for s, d, w in zip(y, delta, a, strict=True)]
        return behind(flat)

    def full() -> list[Tensor]:
        normalised = before()
        return behind([F.linear(normalised, weight) for weight in weights])

    tokens = x.shape[0] * x.shape[1]
    flops = 2 * tokens * (b.numel() + sum(map_a.numel() for map_a in a))
    moved = _bytes(x, p, b, *y, *y, *a) + (_bytes(scale, shift, gate, residual) if ada else 0)
    return Case(op, name, arguments, plain, full, moved, flops)


def _norms(op: Op, shape: Shape, make: _Maker) -> Iterator[Case]:
    x, scale, shift = make.tokens(), make.modulation(), make.modulation()

    def plain() -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), None, None, 1e-6) * (1 + scale) + shift

    yield Case(op, shape.name, {"x": x, "scale": scale, "shift": shift}, plain, None, _bytes(x, x, scale, shift), 0)


def _residuals(op: Op, shape: Shape, make: _Maker) -> Iterator[Case]:
    for count in (1, 4):
        x, gates = make.tokens(), [make.modulation() for _ in range(count)]
        values = [make.tokens() for _ in range(count)]

        def plain(x: Tensor = x, gates: list[Tensor] = gates, values: list[Tensor] = values) -> Tensor:
            for gate, value in zip(gates, values, strict=True):
                x = x + rows(gate, x) * value
            return x

        arguments = {"x": x, "gates": gates, "values": values}
        yield Case(op, f"{shape.name} n{count}", arguments, plain, None, _bytes(x, x, *gates, *values), 0)


def _combinations(op: Op, shape: Shape, make: _Maker) -> Iterator[Case]:
    for count in (2, 4):
        values = [make.tokens() for _ in range(count)]
        coefficients = make.random(count, dtype=torch.float32)

        numbers: list[float] = coefficients.tolist()

        def plain(values: list[Tensor] = values, numbers: list[float] = numbers) -> Tensor:
            total = numbers[0] * values[0]
            for weight, value in zip(numbers[1:], values[1:], strict=True):
                total = torch.add(total, value, alpha=weight)
            return total

        arguments = {"values": values, "coefficients": coefficients}
        yield Case(op, f"{shape.name} n{count}", arguments, plain, None, _bytes(values[0], *values), 0)
