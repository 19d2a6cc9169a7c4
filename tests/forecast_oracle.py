"""The oracle with forecasts, and TaylorSeer as its code does it: factors that are updated whenever a value is stored."""

import math

import torch
from oracle import Oracle


class TaylorSeer:
    """Difference factors of one value."""

    def __init__(self, order: int) -> None:
        self.order, self.factors, self.time = order, [], None

    def store(self, value, time: float) -> None:
        new = [value]
        for old in self.factors[: self.order]:
            new.append((new[-1] - old) / (time - self.time))
        self.factors, self.time = new, time

    def predict(self, now: float):
        x = now - self.time
        return sum(x**j / math.factorial(j) * factor for j, factor in enumerate(self.factors))


class ForecastOracle(Oracle):
    """Forecasts by coefficients: `tables[step, site name]` is (terms, one row per branch or None, [terms, C] or None)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.tables: dict = {}
        self.history = [{} for _ in self.stored]
        self.latents = None

    @classmethod
    def of(cls, model, plan, affine=None):
        """An oracle for a plan, with its coefficients."""
        oracle = super().of(model, plan)
        for (step, i), forecast in plan.forecasts.items():
            name = plan.sites[i].name
            table = affine[f"{name}/{step}"] if not forecast.coefficients else None
            oracle.tables[step, name] = (forecast.terms, forecast.coefficients, table)
        return oracle

    def value(self, site, compute):
        """As the oracle's, with a memory of everything that was ever computed."""
        if self.letter(site) != "F":
            value = super().value(site, compute)
            if self.letter(site) == "C":
                self.history[self.branch].setdefault(site, []).insert(0, (value.clone(), self.latents.clone()))
            return value
        terms, rows, table = self.tables[self.calls // len(self.stored), site]
        weights = table if table is not None else rows[self.branch]
        past, total = self.history[self.branch][site], 0
        for term, weight in zip(terms, weights, strict=True):
            if term == "1":
                total = total + weight
                continue
            value = self.latents if term == "x0" else past[int(term[1:]) - 1]["yx".index(term[0])]
            if term[0] == "x" and value.shape != past[0][0].shape:
                value = torch.cat([value, torch.zeros_like(value)], 1)
            total = total + weight * value
        return total

    def end_of_stack(self, tokens_out):
        """A forecast residual is added to the tokens too."""
        residual = self.value("stack_residual", lambda: tokens_out - self.tokens_in)
        if self.letter("stack_residual") in "RF":
            tokens_out = self.tokens_in + residual
        return self.value("hidden", lambda: tokens_out)

    def __call__(self, *args, **kwargs):
        self.latents = kwargs["hidden_states"]
        return super().__call__(*args, **kwargs)
