"""The compiled program of one sampling run, with everything that a user does with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepgraph.checked import checked
from stepgraph.runtime.artifact.write_artifact import write_artifact
from stepgraph.runtime.attach.attach import attach, detach
from stepgraph.runtime.export.export import export
from stepgraph.runtime.session.compiled import Compiled
from stepgraph.runtime.warm_up import WarmedUp, warm_up


@dataclass(frozen=True, eq=False, repr=False)
class Executable(Compiled):
    """A plan compiled for a model: run it in a session or a pipeline, save it, export it.

    Immutable: whatever changes while it runs lives in a `Session`.
    """

    def attach(self, pipe: Any) -> "Executable":
        """Let a diffusers pipeline run this executable in place of its transformer; undone by `detach`."""
        attach(self, pipe)
        return self

    def detach(self) -> None:
        """Give every pipeline this executable is attached to its own transformer back."""
        detach(self)

    @checked
    def save(self, path: str | Path, with_weights: bool = False, scheduler: Any = None) -> None:
        """Write an artifact for `stepgraph.load`: data only, no code (docs/artifacts.md).

        Args:
            path: A folder, or a file where it ends in .zip. It appears whole or not at all; an artifact there is replaced.
            with_weights: Put the model's weights and configuration into it, so that it can be loaded without the model.
            scheduler: Put this scheduler's configuration into it, so that `stepgraph run --artifact` needs no other.

        Raises:
            CompileError: The model's configuration or an input cannot be written as JSON.
            PlanError: Something that is no artifact stands at `path`, or the scheduler is not the plan's.
            OSError: The place cannot be written.
        """
        write_artifact(self, path, with_weights, scheduler)

    @checked
    def warm_up(self, scheduler: Any = None, guidance_scale: float | None = None, **inputs: Any) -> WarmedUp:
        """Do now what otherwise happens in the first runs: load kernels and tune them, take memory, capture CUDA graphs.

        Runs with arguments of the same shapes neither tune nor capture nor allocate on the device afterwards.

        Args:
            scheduler: Warm up `stepgraph.sample` with it; without one, the calls that pipelines and sessions make.
            guidance_scale: Of these runs; the graph of a run is for one scale.
            **inputs: What the runs will be given, where shapes are others than those compiled for: the model's inputs, or
                with a scheduler `noise` and the conditioning, as `sample` has them. Missing ones are zeros.

        Returns:
            Seconds and bytes that it took, and what was captured; they are logged as well.

        Raises:
            ArgumentError: The plan is for guidance, and there is a scheduler without a scale.
            CompileError: `cuda_graphs=True`, and nothing can be captured.
        """
        return warm_up(self, scheduler, guidance_scale, inputs)

    @checked
    def export(self, path: str | Path, format: str = "pt2", **options: Any) -> Path:
        """Write the executable as files that run, or are read, without stepgraph (`stepgraph.runtime.export.export.export`)."""
        return export(self, path, format, **options)
