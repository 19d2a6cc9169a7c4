"""What a pass over a whole program may see, and the program that it rewrites."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.config import CompileConfig
from stepgraph.plan import CachePlan
from stepgraph.runtime.program.tables import Hoisted
from stepgraph.schedule import TimestepInput


@dataclass(frozen=True)
class ModelContext:
    """What a pass over the marked graph sees, before rows are made of it: the plan for its sites."""

    plan: CachePlan


@dataclass
class RowGraphs:
    """The graphs of a plan's distinct rows, which passes over the program rewrite.

    Attributes:
        graphs: One per variant.
        contexts: What each variant reads and stores.
        rows: `rows[step]` is the index of the step's graph and context.
        folded: Sites whose stored values are now part of another's.
        hoisted: What is computed before the loop.
        conditioning: The graphs that compute it, by name.
        tables: The tables that each variant takes behind its other inputs.
    """

    graphs: tuple[fx.GraphModule, ...]
    contexts: tuple[PassContext, ...]
    rows: tuple[int, ...]
    folded: frozenset[int] = frozenset()
    hoisted: Hoisted | None = None
    conditioning: dict[str, fx.GraphModule] = field(default_factory=dict)
    tables: tuple[tuple[int, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        self.tables = self.tables or ((),) * len(self.graphs)

    def named(self) -> dict[str, fx.GraphModule]:
        """All graphs there are by now, by the names of their dumps."""
        return {**{f"variant{index:03d}": gm for index, gm in enumerate(self.graphs)}, **self.conditioning}


@dataclass(frozen=True)
class ProgramContext:
    """What a pass over the whole program sees.

    Attributes:
        inputs: Names of the model's tensor inputs; the latents come first.
        results: How many of a graph's outputs are the model's.
        planned: Steps of the plan, T.
        config: What was asked for: exact programs have tables of one step each, and tables may have a limit.
        timestep: What pipelines make of the scheduler's timestep for the model.
        packs: Whether a linear map of (x, weight) runs with packed weights.
    """

    inputs: tuple[str, ...]
    results: int
    planned: int
    config: CompileConfig
    timestep: TimestepInput = field(default_factory=TimestepInput)
    packs: Callable[[torch.Tensor, torch.Tensor], bool] = lambda x, weight: False

    @property
    def steps(self) -> int:
        """How many values a table at timestep level has: T, or 1 where each step computes its own."""
        return 1 if self.config.exact else self.planned

    @property
    def limit_bytes(self) -> float | None:
        """Most bytes of all tables; None for no limit."""
        return None if self.config.hoist_limit_mb is None else self.config.hoist_limit_mb * 1e6
