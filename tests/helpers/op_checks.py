"""Arguments for the fused operations, and the comparison of what a provider makes of them with the reference in float64."""

from typing import Any

import torch
from torch import Tensor

from stepgraph.ops import OPS, Op
from stepgraph.tolerances import OP, tolerance
from stepgraph.tuning import tuning


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, device: str = "cpu") -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype)


def assert_near_reference(op: Op, results: Any, dtype: torch.dtype, *args: Any, **named: Any) -> None:
    """Relative L2 of each result; what was left unwritten and is NaN does not pass."""
    expected = op.reference(*wide(args), **{name: wide(value) for name, value in named.items()})
    # Only products with B are deep; those with A are of some rank.
    depth = args[0].shape[-1] if op.name.startswith("lowrank") else 1
    pairs = zip(results, expected, strict=True) if isinstance(results, list) else [(results, expected)]
    for one, other in pairs:
        assert one.shape == other.shape
        assert one.is_contiguous()
        error = ((one.double() - other).norm() / other.norm()).item()
        assert error <= tolerance(OP, dtype, depth), error


def wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return type(value)(map(wide, value)) if isinstance(value, (list, tuple)) else value


def check_triton(name: str, dtype: torch.dtype, *args: Any, **named: Any) -> Any:
    """Run an operation with the Triton provider; its results are those of the reference in float64."""
    op = OPS[name]
    assert op.choose(*args, **named).name == "triton"
    with tuning():
        results = op(*args, **named)
    assert_near_reference(op, results, dtype, *args, **named)
    return results


def lowrank_case(shape, ranks, columns, dtype, modulated=False, gated=False, device="cpu"):
    """Arguments of lowrank_delta with a changed input, the unchanged input, and the named arguments."""
    (batch, tokens, channels), like = shape, {"dtype": dtype, "device": device}
    x = random(*shape, **like)
    b = random(sum(ranks), channels, scale=channels**-0.5, **like)
    a = [random(out, rank, scale=rank**-0.5, **like) for out, rank in zip(columns, ranks)]
    y = [random(batch, tokens, out, **like) for out in columns]
    named, seen = {}, x
    if modulated:
        named = {"scale": random(batch, channels, scale=0.3, **like), "shift": random(1, 1, channels, **like)}
        seen = OPS["modulated_norm"](x, *named.values())
    if gated:
        named |= {"gate": random(batch, columns[0], **like), "residual": random(batch, tokens, columns[0], **like)}
    p = OPS["lowrank_input"](seen, b)
    return (x + random(*shape, scale=0.3, **like), y, p, a, b), x, named
