"""A small module to trace, and the proof that a trace is exact."""

import torch
from torch import nn
from torch.utils import _pytree as pytree


def run_traced(traced, model, given):
    """What the traced graph returns, in the shape in which the forward returned it."""
    with torch.no_grad():
        flat = traced.bind(model)(*(given[name] for name in traced.inputs))
    return pytree.tree_unflatten(list(flat), traced.output_spec)


def flat_tensors(result):
    return pytree.tree_leaves(result)


def assert_exact(traced, model, given):
    with torch.no_grad():
        wanted = flat_tensors(model(**{name: value.clone() for name, value in given.items()}))
    got = flat_tensors(run_traced(traced, model, given))
    assert len(got) == len(wanted)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted, strict=True))


class Small(nn.Module):
    """A module whose forward is one of the functions below."""

    def __init__(self, forward):
        super().__init__()
        self.inner, self.run = nn.Linear(6, 6), forward
        self.register_buffer("scale", torch.arange(6.0))
        self.held = torch.full((6,), 0.5)
        self.calls, self.log, self.table = 0, [], {}

    def forward(self, x):
        return self.run(self, x)
