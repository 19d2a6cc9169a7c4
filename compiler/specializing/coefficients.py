"""The coefficients of forecasts: which constants a step has, and their tensors."""

from collections.abc import Mapping
from typing import Any

import torch

from stepgraph.compiler.interfaces.pass_context import coefficient_dtype
from stepgraph.plan import CachePlan
from stepgraph.plan.corrections import Forecast
from stepgraph.plan.factors import Factors


def numbered_forecasts(plan: CachePlan, step: int) -> dict[int, tuple[Forecast, int]]:
    """Site index -> its forecast at a step and the number of the constant with its coefficients, counted from 0.

    Equal forecasts share a constant; those with coefficients per channel have one each.
    """
    numbers: dict[Any, int] = {}
    forecasts = {}
    for i in range(len(plan.sites)):
        forecast = plan.forecasts.get((step, i))
        if forecast is not None:
            forecasts[i] = (forecast, numbers.setdefault(i if forecast.per_channel else forecast, len(numbers)))
    return forecasts


def coefficients_of(
    plan: CachePlan, factors: Factors | None, device: torch.device, weight_dtype: torch.dtype
) -> tuple[tuple[tuple[torch.Tensor, ...], ...], ...]:
    """Per step and branch, the tensors of the forecasts' coefficients, on the weights' device."""
    dtype, steps = coefficient_dtype(weight_dtype), []
    affine: Mapping[str, torch.Tensor] = factors.affine if factors is not None else {}
    for step in range(plan.steps):
        used = sorted((constant, i, forecast) for i, (forecast, constant) in numbered_forecasts(plan, step).items())
        numbered = {constant: (i, forecast) for constant, i, forecast in used}
        branches = []
        for branch in range(len(plan.header.branches)):
            tensors = []
            for i, forecast in numbered.values():
                rows = affine[f"{plan.sites[i].name}/{step}"] if forecast.per_channel else forecast.coefficients[branch]
                tensors.append(torch.as_tensor(rows, dtype=dtype, device=device))
            branches.append(tuple(tensors))
        steps.append(tuple(branches))
    return tuple(steps)
