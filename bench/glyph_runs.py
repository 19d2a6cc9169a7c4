"""Sampling runs of glyph-dit that benchmarks compare: the same noise and classes for every plan."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from stepgraph.compiler.describe import example_inputs
from stepgraph.compiler.models.load import load_model, load_scheduler
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.glyphs import CLASSES, NULL_CLASS
from stepgraph.plan import CachePlan
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.sampler import sample


@dataclass(frozen=True)
class GlyphRuns:
    """Real sampling runs with guidance.

    Attributes:
        scheduler_name: One of `stepgraph.compiler.models.load.SCHEDULERS`.
        steps: Number of inference steps.
        count: Images per run, the classes in turn.
        guidance: The guidance scale.
        device: Where the model runs.
    """

    scheduler_name: str
    steps: int
    count: int
    guidance: float
    device: str

    @cached_property
    def model(self) -> Any:
        """glyph-dit."""
        return load_model("glyph-dit", self.device)

    @cached_property
    def scheduler(self) -> Any:
        """The scheduler with glyph-dit's configuration."""
        return load_scheduler("glyph-dit", self.scheduler_name)

    @property
    def labels(self) -> torch.Tensor:
        """Class of each image, [N] int64."""
        return torch.arange(self.count, device=self.device) % len(CLASSES)

    @cached_property
    def reference(self) -> torch.Tensor:
        """What full compute gives, [N, 3, 24, 24]."""
        return self.images(self.model)

    def compiled(self, plan: CachePlan) -> Executable:
        """The plan's executable for a batch with guidance."""
        return compile_plan(self.model, plan, example_inputs(self.model, 2 * self.count), CompileConfig("eager"))

    def images(self, runner: Any, steps: int | None = None, seed: int = 0) -> torch.Tensor:
        """Images [N, 3, 24, 24] of an executable or a model, on the CPU."""
        noise = torch.randn(self.count, 3, 24, 24, generator=torch.Generator().manual_seed(seed)).to(self.device)
        conditioning: dict[str, Any] = {
            "class_labels": self.labels, "negative_class_labels": torch.full_like(self.labels, NULL_CLASS),
        }  # fmt: skip
        return sample(runner, self.scheduler, noise, self.guidance, steps=steps or self.steps, **conditioning).cpu()

    def errors(self, images: torch.Tensor) -> torch.Tensor:
        """Relative L2 distance of each image from full compute's, [N] float64."""
        difference, size = (t.double().square().flatten(1).sum(dim=1) for t in (images - self.reference, self.reference))
        return (difference / size).sqrt()
