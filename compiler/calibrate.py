"""Calibration: watch a model's sites during real sampling runs."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from stepgraph.compiler.describe import example_inputs, make_header, marked_graph, model_dtype
from stepgraph.compiler.graphs import written_storages
from stepgraph.compiler.models import family_of
from stepgraph.compiler.passes.context import PassContext
from stepgraph.compiler.passes.erase_markers import erase_markers
from stepgraph.compiler.passes.store_site import store_site
from stepgraph.compiler.sites import MarkedGraph
from stepgraph.files import whole_file
from stepgraph.fingerprint import config_of
from stepgraph.plan import COMPUTE, PlanError, PlanHeader, Site, parse_record
from stepgraph.runtime.sampler import sample

FORMAT = "stepgraph-stats"
VERSION = 1


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """Statistics of a model's sites over real sampling runs, averaged over the samples.

    Attributes:
        header: Model, scheduler and steps they belong to, with seed and number of samples.
        sites: The model's sites.
        magnitude: Mean absolute value of each site at each step, [T, sites] float64.
        change: Mean absolute difference from the step before, [T, sites] float64; row 0 is zero. This is the error that
            reusing the last value would make.
    """

    header: PlanHeader
    sites: tuple[Site, ...]
    magnitude: torch.Tensor
    change: torch.Tensor

    @property
    def relative_change(self) -> torch.Tensor:
        """`change` over `magnitude`, [T, sites] float64."""
        return self.change / self.magnitude.clamp_min(1e-300)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose metadata is the header as JSON; it appears whole or not at all."""
        described = {
            "format": FORMAT,
            "version": VERSION,
            "header": asdict(self.header),
            "sites": list(map(asdict, self.sites)),
        }
        with whole_file(path) as partial:
            tensors = {"magnitude": self.magnitude, "change": self.change}
            save_file(tensors, partial, metadata={"stepgraph": json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationStats":
        """Read a file written by `save`.

        Raises:
            PlanError: The file is not a complete statistics file of this version.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                described = json.loads((file.metadata() or {}).get("stepgraph", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise PlanError(f"{path}: not a complete statistics file ({error})") from error
        if described.get("format") != FORMAT or described.get("version") != VERSION:
            raise PlanError(
                f"{path}: expected {FORMAT} version {VERSION}; got {described.get('format')} {described.get('version')}"
            )
        header = parse_record(PlanHeader, described.get("header"), f"{path}: header")
        sites = tuple(parse_record(Site, site, f"{path}: site {i}") for i, site in enumerate(described.get("sites") or ()))
        for name in ("magnitude", "change"):
            if name not in tensors or tuple(tensors[name].shape) != (len(header.timesteps), len(sites)):
                raise PlanError(f"{path}: {name} is not a [{len(header.timesteps)}, {len(sites)}] table")
        return cls(header, sites, tensors["magnitude"], tensors["change"])


class _Observer(nn.Module):
    """Runs the traced model with every site's value as an output, and keeps running sums over samples."""

    def __init__(self, model: nn.Module, marked: MarkedGraph, steps: int) -> None:
        super().__init__()
        self.observed = model
        every = tuple(range(len(marked.sites)))
        context = PassContext(marked.sites, COMPUTE * len(every), (), every, written_storages(marked.graph))
        self.graph = marked.trace.bind(model, marked.graph)
        store_site(self.graph, context)
        erase_markers(self.graph, context)
        self.graph.recompile()
        self.names = tuple(marked.trace.inputs)
        self.magnitude = torch.zeros(steps, len(every), dtype=torch.float64)
        self.change = torch.zeros(steps, len(every), dtype=torch.float64)
        self.last: list[torch.Tensor] | None = None
        self.step = 0

    def begin(self) -> None:
        """A new sampling run."""
        self.step, self.last = 0, None

    def forward(self, return_dict: bool = False, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        """One evaluation; the sums grow by this sample's means."""
        result, *values = self.graph(*(inputs[name] for name in self.names))
        for i, value in enumerate(values):
            self.magnitude[self.step, i] += value.abs().mean(dtype=torch.float64).cpu()
            if self.last is not None:
                self.change[self.step, i] += (value - self.last[i]).abs().mean(dtype=torch.float64).cpu()
        self.last = values
        self.step += 1
        return (result,)


def calibrate(
    model: nn.Module,
    scheduler: Any,
    *,
    steps: int = 50,
    samples: int = 16,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> CalibrationStats:
    """Sample conditionally, without guidance, and average over the samples how much each site changes per step.

    Args:
        model: On any device; the example conditioning of its family is used (classes in turn for DiT).
        scheduler: A deterministic diffusers scheduler; it is copied and not changed.
        steps: Number of inference steps.
        samples: Number of sampling runs, one sample each.
        seed: Of the noise.
        on_step: Called with (evaluations done, evaluations in all).

    Memory holds the sites' values of two steps, whatever the number of steps and samples.
    """
    if samples < 1:
        raise PlanError(f"samples is {samples}; expected at least 1")
    inputs = example_inputs(model)
    marked = marked_graph(model, inputs)
    header = make_header(model, scheduler, steps, marked, guidance="none")
    evaluations = len(header.timesteps)
    observer = _Observer(model, marked, evaluations)
    generator = torch.Generator().manual_seed(seed)
    latents = next(iter(inputs.values()))
    conditioning, _ = family_of(model).conditioning(config_of(model), samples, latents.device)
    for number in range(samples):
        observer.begin()
        noise = torch.randn(latents.shape, generator=generator).to(latents.device, model_dtype(model))
        chosen = {name: value[number : number + 1] for name, value in conditioning.items()}
        report = None if on_step is None else _shifted(on_step, number * evaluations, samples * evaluations)
        sample(observer, scheduler, noise, steps=steps, on_step=report, **chosen)
    described = PlanHeader(**{**asdict(header), "seed": seed, "samples": samples})
    return CalibrationStats(described, marked.sites, observer.magnitude / samples, observer.change / samples)


def _shifted(on_step: Callable[[int, int], None], done: int, total: int) -> Callable[[int, int], None]:
    return lambda step, _: on_step(done + step, total)
