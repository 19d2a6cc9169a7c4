"""Random weights are drawn where they will lie, in the dtype that they will have."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepgraph.compiler.entry.load_model import _parameters_in, load_model


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation gives, by device and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[tuple[str, torch.dtype], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            key = (result.device.type, result.dtype)
            self.bytes[key] = max(self.bytes.get(key, 0), result.nbytes)
        return result


def test_a_large_model_is_drawn_on_its_device():
    """Of FLUX's 24 GB nothing is on the host, and in float32 no more than one map at a time."""
    with Largest() as largest:
        model = load_model("flux-dev:random", "meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert "cpu" not in {device for device, _ in largest.bytes}
    whole = sum(p.nbytes for p in model.parameters())
    assert whole == pytest.approx(23.8e9, rel=1e-2)
    assert largest.bytes["meta", torch.float32] <= 2 * max(p.nbytes for p in model.parameters()) < whole / 100


def test_parameters_are_drawn_in_their_dtype_while_it_is_said():
    with _parameters_in(torch.bfloat16):
        linear, embedding = nn.Linear(64, 64), nn.Embedding(3, 4)
    assert {p.dtype for p in (*linear.parameters(), *embedding.parameters())} == {torch.bfloat16}
    # As nn.Linear draws them: uniform up to one over the root of 64.
    assert 0.11 < float(linear.weight.detach().abs().max()) <= 0.1255
    assert linear.weight.requires_grad
    assert nn.Linear(2, 2).weight.dtype == torch.float32
