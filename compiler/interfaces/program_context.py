"""What a pass over a whole program may see, and the program that it rewrites."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext
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
        tables: The tables that each variant takes behind its other inputs.
    """

    graphs: tuple[fx.GraphModule, ...]
    contexts: tuple[PassContext, ...]
    rows: tuple[int, ...]
    folded: frozenset[int] = frozenset()
    hoisted: Hoisted | None = None
    tables: tuple[tuple[int, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        self.tables = self.tables or ((),) * len(self.graphs)


@dataclass(frozen=True)
class ProgramContext:
    """What a pass over the whole program sees.

    Attributes:
        inputs: Names of the model's tensor inputs; the latents come first.
        results: How many of a graph's outputs are the model's.
        steps: How many values a table at timestep level has: T, or 1 where each step computes its own.
        timestep: What pipelines make of the scheduler's timestep for the model.
        limit_bytes: Most bytes of all tables; None for no limit.
        packs: Whether a linear map of (x, weight) runs with packed weights.
    """

    inputs: tuple[str, ...]
    results: int
    steps: int = 1
    timestep: TimestepInput = field(default_factory=TimestepInput)
    limit_bytes: float | None = None
    packs: Callable[[torch.Tensor, torch.Tensor], bool] = lambda x, weight: False
