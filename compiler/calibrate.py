"""Calibration: watch a model's sites during real sampling runs."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stepgraph.compiler.describe import example_inputs, make_header, marked_graph
from stepgraph.compiler.graphs import written_storages
from stepgraph.compiler.models import family_of
from stepgraph.compiler.passes.context import PassContext
from stepgraph.compiler.passes.erase_markers import erase_markers
from stepgraph.compiler.passes.store_site import store_site
from stepgraph.compiler.sites import MarkedGraph
from stepgraph.compiler.stats import LAGS, CalibrationStats, table_shapes
from stepgraph.fingerprint import config_of, model_dtype
from stepgraph.plan import COMPUTE, PlanError
from stepgraph.runtime.sampler import sample


class _Observer(nn.Module):
    """Runs the traced model with every site's value as an output, and keeps running sums over samples.

    The rate of change is measured from a reference that stands still from the second hit of a run of `provisional` hits on
    (InvarDiff's resampling correction, as its code does it); without hits the reference is always the step before.
    """

    def __init__(self, model: nn.Module, marked: MarkedGraph, steps: int, provisional: torch.Tensor | None) -> None:
        super().__init__()
        self.observed = model
        every = tuple(range(len(marked.sites)))
        context = PassContext(marked.sites, COMPUTE * len(every), (), every, written_storages(marked.graph))
        self.graph = marked.trace.bind(model, marked.graph)
        store_site(self.graph, context)
        erase_markers(self.graph, context)
        self.graph.recompile()
        self.names = tuple(marked.trace.inputs)
        self.tables = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in table_shapes(steps, len(every)).items()}
        self.hits = torch.zeros(steps, len(every), dtype=torch.bool) if provisional is None else provisional
        self.begin()

    def begin(self) -> None:
        """A new sampling run."""
        sites = self.hits.shape[1]
        self.step = 0
        self.past: deque[list[torch.Tensor]] = deque(maxlen=LAGS)
        self.reference: list[torch.Tensor | None] = [None] * sites
        self.distance = [0.0] * sites
        self.held = [False] * sites

    def forward(self, return_dict: bool = False, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        """One evaluation; the sums grow by this sample's values."""
        result, *values = self.graph(*(inputs[name] for name in self.names))
        for i, value in enumerate(values):
            self._add_means(i, value)
            self._add_rate(i, value)
        self.past.appendleft(values)
        self.step += 1
        return (result,)

    def _add_means(self, i: int, value: torch.Tensor) -> None:
        s, size = self.step, float(value.abs().mean(dtype=torch.float64))
        self.tables["magnitude"][s, i] += size
        for lag, values in enumerate(self.past):
            difference = float((value - values[i]).abs().mean(dtype=torch.float64))
            self.tables["relative"][lag, s, i] += _over(difference, size)
            if lag == 0:
                self.tables["change"][s, i] += difference
        now, before = (v.double().norm(dim=-1) for v in (value, self.past[0][i] if self.past else value))
        # A token that is zero at both steps has not changed: ratio 1.
        self.tables["ratio"][s, i] += torch.where((now == 0) & (before == 0), 1.0, now / before).mean().cpu()

    def _add_rate(self, i: int, value: torch.Tensor) -> None:
        s, reference = self.step, self.reference[i]
        if reference is None:
            self.reference[i] = value
            return
        # 1e-8 is added to every difference, and nothing guards the denominator: as in the method's code.
        distance = float((value.double() - reference.double() + 1e-8).abs().sum())
        if s == 1:
            self.reference[i], self.distance[i] = value, distance
            return
        self.tables["rate"][s - 1, i] += _over(distance, self.distance[i])
        hit = bool(self.hits[s - 1, i])
        if not (hit and self.held[i]):
            self.reference[i], self.distance[i] = value, distance
        self.held[i] = hit


def calibrate(
    model: nn.Module,
    scheduler: Any,
    *,
    steps: int = 50,
    samples: int = 16,
    seed: int = 0,
    provisional: torch.Tensor | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> CalibrationStats:
    """Sample conditionally, without guidance, and average over the samples how each site changes from step to step.

    Args:
        model: On any device; the example conditioning of its family is used (classes in turn for DiT).
        scheduler: A deterministic diffusers scheduler; it is copied and not changed.
        steps: Number of inference steps.
        samples: Number of sampling runs, one sample each.
        seed: Of the noise.
        provisional: [T, sites] bool, a plan's reuses: the table `rate` is then measured as InvarDiff's second phase does.
        on_step: Called with (evaluations done, evaluations in all).

    Memory holds the sites' values of five steps, whatever the number of steps and samples.

    Raises:
        PlanError: No samples, `provisional` of another shape, or NaN in what was measured.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise PlanError(f"samples is {samples!r}; expected a whole number of at least 1")
    inputs = example_inputs(model)
    marked = marked_graph(model, inputs)
    header = make_header(model, scheduler, steps, marked, guidance="none")
    evaluations = len(header.timesteps)
    if provisional is not None and tuple(provisional.shape) != (evaluations, len(marked.sites)):
        raise PlanError(f"provisional is {list(provisional.shape)}; expected [{evaluations}, {len(marked.sites)}]")
    observer = _Observer(model, marked, evaluations, provisional)
    generator = torch.Generator().manual_seed(seed)
    latents = next(iter(inputs.values()))
    conditioning, _ = family_of(model).conditioning(config_of(model), samples, latents.device)
    for number in range(samples):
        observer.begin()
        noise = torch.randn(latents.shape, generator=generator).to(latents.device, model_dtype(model))
        chosen = {name: value[number : number + 1] for name, value in conditioning.items()}
        report = None if on_step is None else _shifted(on_step, number * evaluations, samples * evaluations)
        sample(observer, scheduler, noise, steps=steps, on_step=report, **chosen)
    tables = {name: table / samples for name, table in observer.tables.items()}
    tables["rate"][0] = tables["rate"][-1] = 1.0
    bad = torch.nonzero(~tables["magnitude"].isfinite())
    if len(bad):
        step, site = bad[0].tolist()
        raise PlanError(f"{marked.sites[site].name} is not finite at step {step}: NaN or infinite values in the model's run")
    return CalibrationStats(replace(header, seed=seed, samples=samples), marked.sites, **tables)


def _over(part: float, whole: float) -> float:
    """Part / whole; nothing over nothing is no change, something over nothing has no bound."""
    return part / whole if whole else (math.inf if part else 0.0)


def _shifted(on_step: Callable[[int, int], None], done: int, total: int) -> Callable[[int, int], None]:
    return lambda step, _: on_step(done + step, total)
