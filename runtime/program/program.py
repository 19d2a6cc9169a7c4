"""What an executable runs: the variants of a plan for inputs of one signature, and where their values lie."""

import reprlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from stepgraph.env import read_env
from stepgraph.errors import PlanError
from stepgraph.inputs import flat_inputs, holds_tensors
from stepgraph.plan import CachePlan
from stepgraph.runtime.memory.layout import Layout
from stepgraph.runtime.memory.slots import SlotPlan
from stepgraph.runtime.program.facts import Facts
from stepgraph.runtime.program.freeze import LEAVES, Frozen, difference, freeze
from stepgraph.runtime.program.region_calls import VariantCall
from stepgraph.runtime.program.tables import Hoisted
from stepgraph.runtime.program.watch import FactsWatch
from stepgraph.weight_kinds import inner_tensors, is_plain


@dataclass(frozen=True)
class Variant:
    """The specialised graph of one distinct (actions, stores).

    Attributes:
        run: Takes the inputs, the tensors of the slots read, constants and tables.
        graph: The same before lowering, for reading.
        row: One action letter per site.
        macs: Multiply-accumulates of one call, for the whole batch, those of hoisted values included.
        providers: "<op> by <provider>" -> number of calls, of the fused operations in the graph.
        tables: Which of the program's tables it takes.
    """

    run: VariantCall
    graph: fx.GraphModule
    row: str
    macs: int
    providers: Mapping[str, int] = field(default_factory=dict)
    tables: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """All steps for inputs of one signature.

    Attributes:
        plan: The plan, with sizes and costs measured on this model.
        input_names: Order of the variants' tensor inputs.
        variants: The distinct specialised graphs.
        rows: Which variant each step runs.
        slots: What each step reads, stores and frees.
        layout: Where in a session's arena that lies.
        constants: Per step and branch, the coefficients of its forecasts.
        results: How many of a variant's outputs are the model's.
        output_spec: Rebuilds the model's return value from them.
        batch: The batch size of the inputs.
        macs_total: Multiply-accumulates of one evaluation with nothing reused, for the whole batch.
        seconds: How long each stage of compilation took.
        hoisted: What is computed before the loop, unless hoisting is off.
        regions: How many distinct regions were compiled.
        factor_bytes: Size of the low-rank factors.
        folded: Sites whose stored values are part of another's: a sum takes their place.
        facts: What its graphs depend on beside inputs and the contents of weights.
        tensors: What its graphs read beside inputs, weights and strengths; whoever holds it may write to it.
        table_rows: By the inputs that say rows of tables (class labels), how many rows there are.
        watch: Compares the facts with a model.
        nested: Whether the return value holds tensors within lists, tuples or dicts of its own (Z-Image's list of samples).
    """

    plan: CachePlan
    input_names: tuple[str, ...]
    variants: tuple[Variant, ...]
    rows: tuple[int, ...]
    slots: SlotPlan
    layout: Layout
    constants: tuple[tuple[tuple[torch.Tensor, ...], ...], ...]
    results: int
    output_spec: pytree.TreeSpec
    batch: int
    macs_total: int
    seconds: Mapping[str, float]
    hoisted: Hoisted | None = None
    regions: int = 0
    factor_bytes: int = 0
    folded: frozenset[int] = frozenset()
    facts: Facts = field(default_factory=lambda: Facts({}))
    tensors: tuple[torch.Tensor, ...] = ()
    table_rows: Mapping[str, int] = field(default_factory=dict)
    watch: FactsWatch = field(init=False)
    nested: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "watch", FactsWatch(self.facts))
        object.__setattr__(self, "nested", any(not part.is_leaf() for part in self.output_spec.children()))

    def returned(self, results: Sequence[torch.Tensor], return_dict: bool) -> Any:
        """The model's return value, made of its flat results; without `return_dict` as diffusers' plain tuple."""
        if not (return_dict or self.nested):
            return tuple(results)
        whole = pytree.tree_unflatten(results, self.output_spec)
        if return_dict:
            return whole
        if isinstance(whole, Mapping):
            return tuple(whole.values())
        return whole if isinstance(whole, tuple) else (whole,)

    @property
    def begin(self) -> int:
        """The evaluation of the scheduler's schedule with which its runs begin."""
        return self.plan.header.schedule.begin


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of a whole run, for the compiled batch and all branches."""

    computed: int
    total: int
    per_step: tuple[int, ...]

    @property
    def ideal_speedup(self) -> float:
        """Total over computed."""
        return self.total / self.computed if self.computed else float("inf")


@dataclass(frozen=True)
class Memory:
    """Memory of a run in bytes, for the compiled batch and all branches.

    Attributes:
        peak_slot_bytes: The most bytes of stored values held at once.
        slots: How many slots there are.
        values_stored: How many values are stored in the course of a run.
        weight_bytes: The model's weights and the factors.
        table_bytes: Hoisted values.
        arena_bytes: What a session allocates for stored values and for activations that cross regions.
        work_bytes: What of it is for these activations.
        host_bytes: Host memory that it allocates for values that are off-loaded.
    """

    peak_slot_bytes: int
    slots: int
    values_stored: int
    weight_bytes: int
    table_bytes: int
    arena_bytes: int
    work_bytes: int
    host_bytes: int


def described(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs without contents: a tensor as (shape, dtype), a container of tensors as one of these, all else by its value."""

    def about(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.dtype
        if not holds_tensors(value):
            return value
        return described(value) if isinstance(value, dict) else type(value)(map(about, value))

    return {name: about(value) for name, value in inputs.items()}


def describes_tensor(value: Any) -> bool:
    """Whether a value is what `described` makes of a tensor."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype)


def describes_tensors(value: Any) -> bool:
    """Whether a value is what `described` makes of a tensor, or of a container of tensors."""
    if isinstance(value, (dict, list, tuple)) and not describes_tensor(value):
        return any(map(describes_tensors, value.values() if isinstance(value, dict) else value))
    return describes_tensor(value)


def zero_inputs(about: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Inputs of which `described` says this."""

    def made(value: Any) -> Any:
        if describes_tensor(value):
            return torch.zeros(value[0], dtype=value[1], device=device)
        if not describes_tensors(value):
            return value
        return zero_inputs(value, device) if isinstance(value, dict) else type(value)(map(made, value))

    return {name: made(value) for name, value in about.items()}


def signature(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a program is specific to: the tensors' shapes, dtypes and devices, inside dicts too, and all else by its value."""
    return tuple(
        (name, tuple(value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else (name, _by_value(value))
        for name, value in sorted(flat_inputs(inputs).items())
    )


def program_key(inputs: Mapping[str, Any], begin: int) -> tuple[Any, ...]:
    """What an executable finds a program by: the signature, and the plan's step with which runs begin where that is above 0."""
    return (signature(inputs), begin) if begin else signature(inputs)


def _by_value(value: Any) -> Hashable:
    """What equals another value's where a graph that has baked it in holds for both: texts of objects need not say all."""
    return repr(value) if isinstance(value, LEAVES) else _Argument(freeze(value), reprlib.repr(value))


@dataclass(frozen=True, eq=False)
class _Argument:
    """An argument that is neither a tensor nor a plain value, as it was: a list, an array, an object that steers attention."""

    frozen: Frozen
    text: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Argument) and difference("", self.frozen, other.frozen, frozenset()) is None

    def __hash__(self) -> int:
        return hash((self.frozen.kind, self.frozen.text))

    def __str__(self) -> str:
        return self.text


def refuse_nan_weights(model: nn.Module) -> None:
    """STEPGRAPH_CHECK=1: refuse weights that are not finite.

    Raises:
        PlanError: See `refuse_nan`.
    """
    if read_env().check:
        weights = {
            ".".join(filter(None, (name, part))): tensor
            for name, weight in model.named_parameters()
            for part, tensor in inner_tensors(weight).items()
        }
        refuse_nan(weights, f"weights of {type(model).__name__}")


def refuse_nan(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """STEPGRAPH_CHECK=1: refuse tensors that are not finite.

    Raises:
        PlanError: The message names the tensor and how many of its values are NaN or infinite.
    """
    for name, tensor in tensors.items():
        floating = isinstance(tensor, torch.Tensor) and is_plain(tensor) and tensor.is_floating_point()
        if floating and tensor.element_size() > 1:
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise PlanError(
                    f"{what}: {name} has {bad} of {tensor.numel()} values that are NaN or infinite (STEPGRAPH_CHECK)"
                )
