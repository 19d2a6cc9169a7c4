"""Rates of change between three values in a row: what InvarDiff ranks reuses by (arXiv 2512.05134).

A metric takes the new value, the current one and the one before, each [G, B, ...] (G sites, B branches), and gives [G, B]
float64. The rate that belongs to the current value's step is known one step later, when the new value is.
"""

from collections.abc import Callable

import torch

Metric = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def v1(new: torch.Tensor, current: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """The paper's rate: d(new, current) / d(current, previous), where d sums |a - b + 1e-8| over the whole tensor.

    As in the method's first code: 1e-8 is added to every difference, and nothing guards the denominator.
    """
    return over(_distance(new, current), _distance(current, previous))


def relative_l1(new: torch.Tensor, current: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """The rate of the method's later code: as `v1`, in fp32, with the denominator at least 1e-8."""
    after = (new.float() - current.float() + 1e-8).abs().flatten(2).sum(-1)
    before = (current.float() - previous.float() + 1e-8).abs().flatten(2).sum(-1)
    return after.double() / before.double().clamp_min(1e-8)


METRICS: dict[str, Metric] = {"v1": v1, "relative_l1": relative_l1}


def over(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Part / whole; nothing over nothing is no change, something over nothing has no bound."""
    return torch.where((part == 0) & (whole == 0), torch.zeros_like(part), part / whole)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() - b.double() + 1e-8).abs().flatten(2).sum(-1)
