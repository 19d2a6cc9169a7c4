"""What a plan was made for, and the refusal of anything else."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepgraph.checked import check_fields
from stepgraph.checks import check_whole
from stepgraph.errors import PlanError
from stepgraph.plan.json import parse_record
from stepgraph.schedule import Schedule, TimestepInput

DTYPES = ("float64", "float32", "float16", "bfloat16")
# A policy measured nothing on the weights, or chose its actions by that.
NOTHING, CHOICE = MEASURED = ("nothing", "choice")
# What `adapters` is, or begins with, where a plan is declared to hold for any.
ANY = "any"
ADAPTERS = re.compile(rf"({ANY})?( ?[0-9a-f]{{16}})?")
BRANCHES = {"batched": ("all",), "separate": ("cond", "uncond"), "none": ("all",)}


@dataclass(frozen=True)
class PlanHeader:
    """What a plan was made for. A plan is refused where one of these differs.

    Attributes:
        model: Class name of the model.
        fingerprint: Hash of its configuration and parameters, "structure/contents" (`stepgraph.fingerprint`).
        scheduler: Class name of the scheduler.
        scheduler_hash: Hash of the scheduler's configuration.
        steps: The number of inference steps the scheduler is set to; T can be larger (Heun evaluates twice a step).
        timesteps: The T timesteps in sampling order, in the scheduler's own unit.
        shapes: Shape of each tensor input of the model's forward, without the batch dimension.
        dtype: Of the model, as in "float32".
        macs: Multiply-accumulates of one whole evaluation per sample.
        guidance: How conditional and unconditional predictions are made: "batched" in one call, "separate" or "none".
        branches: Names of the model calls within one step, in call order.
        policy: Name of the policy that made the plan, with its `arguments`.
        arguments: The policy's arguments.
        seed: Seed of the calibration, where there was one.
        samples: Samples of the calibration, where there was one.
        prediction: What the scheduler takes the model's output for: "epsilon", "sample", "v_prediction", "flow", or another
            name of its own; empty where it is not known.
        factors: Digest of the low-rank factors that the plan is bound to; empty for none.
        measured: What the policy measured on the weights, one of `MEASURED`; empty in files that do not say it
            (`stepgraph.plan.measured`).
        schedule: What the scheduler's `set_timesteps` is given beside the steps, and at which evaluation the run begins.
        timestep: What pipelines make of the scheduler's timestep for the model; None where the plan does not say, and the
            model's family does.
        adapters: Hash of the adapters (a LoRA's tensors and strengths) that took part when it was made, empty for none; behind
            "any" where it is declared to hold for any (`CachePlan.for_any_adapters`).
        facts: What the model was made of and what its forward read of it (a strength of a module of the user's own) when the
            plan was made, by path; empty where the plan does not say.
    """

    model: str
    fingerprint: str
    scheduler: str
    scheduler_hash: str
    steps: int
    timesteps: tuple[float, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    macs: int
    guidance: str = "batched"
    branches: tuple[str, ...] = ("all",)
    policy: str = "manual"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    samples: int | None = None
    prediction: str = ""
    factors: str = ""
    measured: str = ""
    schedule: Schedule = field(default_factory=Schedule)
    timestep: TimestepInput | None = None
    adapters: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("schedule", Schedule), ("timestep", TimestepInput)):
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, parse_record(kind, getattr(self, name), name))
        check_fields(self, "the header's ")
        try:
            object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
        except OverflowError as error:
            raise PlanError(f"the timesteps must be finite numbers; {error}") from error
        object.__setattr__(self, "shapes", {name: tuple(shape) for name, shape in self.shapes.items()})
        object.__setattr__(self, "branches", tuple(self.branches))
        if not self.timesteps:
            raise PlanError("a plan needs at least one timestep; its header has none")
        if not all(map(math.isfinite, self.timesteps)):
            raise PlanError(f"the timesteps must be finite numbers; got {list(self.timesteps)}")
        check_whole("steps", self.steps, 1)
        check_whole("macs", self.macs, 0)
        for size in (size for shape in self.shapes.values() for size in shape):
            check_whole(f"a size in the input shapes {dict(self.shapes)}", size, 1)
        for name in ("model", "fingerprint", "scheduler", "scheduler_hash", "policy"):
            if not getattr(self, name):
                raise PlanError(f"the header's {name} is empty")
        if self.dtype not in DTYPES:
            raise PlanError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.measured not in ("", *MEASURED):
            raise PlanError(f"measured is {self.measured!r}; expected one of {', '.join(MEASURED)}, or nothing")
        if self.guidance not in BRANCHES:
            raise PlanError(f"guidance is {self.guidance!r}; expected one of {', '.join(BRANCHES)}")
        if self.branches != BRANCHES[self.guidance]:
            raise PlanError(
                f"guidance {self.guidance!r} has the branches {list(BRANCHES[self.guidance])}; got {list(self.branches)}"
            )
        if not isinstance(self.adapters, str) or not ADAPTERS.fullmatch(self.adapters):
            raise PlanError(f"adapters is {self.adapters!r}; expected a hash of 16 hexadecimal digits, nothing, or {ANY!r}")
        for name in ("seed", "samples"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 0)

    @property
    def any_adapters(self) -> bool:
        """Whether the plan is declared to hold for any adapters."""
        return self.adapters.startswith(ANY)

    @property
    def made_with(self) -> str:
        """Hash of the adapters that took part when it was made; empty for none."""
        return self.adapters.removeprefix(ANY).strip()
