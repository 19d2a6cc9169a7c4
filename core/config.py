"""How a plan is compiled."""

import math
from dataclasses import dataclass

import torch

from stepgraph.checked import check_fields
from stepgraph.checks import check_number
from stepgraph.errors import ArgumentError
from stepgraph.errors import CompileError as CompileError

BACKENDS = ("eager", "inductor")
SLOT_DTYPES = ("bfloat16", "float16", "float8_e4m3fn")


@dataclass(frozen=True)
class CompileConfig:
    """Options of `stepgraph.compile`.

    Attributes:
        backend: "inductor" compiles what is distinct in the variants; "eager" runs its generated Python as it is.
        exact: Keep every operation and its order, so that results are bit-equal to the eager model; needs "eager".
        hoist: Compute what depends on the prompt or the timestep alone before the loop; with `exact`, at every step.
        hoist_limit_mb: Most megabytes of such values per branch; the largest stay in the loop beyond it.
        regions: With "inductor", compile each distinct piece of the variants once; else each whole variant.
        prepack: In regions on CPUs, give linear maps a copy of their weights in the layout of oneDNN.
        merge: Run linear maps of one module that read one value (q, k and v) as one, where they have such a copy: one of all.
        slot_dtype: Keep stored values in this narrower dtype ("bfloat16", "float16", "float8_e4m3fn" with a scale per sample);
            values of linear maps that increments are added to keep theirs. None stores values as they are.
        offload: Keep stored values in host memory between uses that are more than three steps apart; on CUDA it is pinned and
            copies run beside the steps.
        cuda_graphs: On CUDA, replay runs of `sample`, and each distinct call of a variant in other runs, as CUDA graphs,
            compared with the work itself when they are captured. None: from the second use on, where that goes and `exact`
            does not ask for the eager model's bits; what does not go is said once and launched. True: from the first, or
            refuse. False: launch every kernel.
        strict: Refuse weights that hold other values than those by which the plan's actions were chosen; else they are
            followed, with a warning.
        respecialize: Where other adapters are on than when it was compiled (a LoRA loaded, switched, fused or deleted), compile
            the plan for the model as it is, at the beginning of a run; some of the last are kept. False refuses such runs.
        max_autotune: Let inductor time its kernels against each other; compiling then takes minutes.
    """

    backend: str = "inductor"
    exact: bool = False
    hoist: bool = True
    hoist_limit_mb: float | None = None
    regions: bool = True
    prepack: bool = True
    merge: bool = True
    slot_dtype: str | None = None
    offload: bool = False
    cuda_graphs: bool | None = None
    max_autotune: bool = False
    strict: bool = False
    respecialize: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.backend not in BACKENDS:
            raise ArgumentError(f"backend is {self.backend!r}; expected one of {', '.join(BACKENDS)}")
        if self.exact and self.backend != "eager":
            raise ArgumentError(f"exact=True keeps the eager operations, but backend is {self.backend!r}; pass backend='eager'")
        if self.slot_dtype not in (None, *SLOT_DTYPES):
            raise ArgumentError(f"slot_dtype is {self.slot_dtype!r}; expected None or one of {', '.join(SLOT_DTYPES)}")
        if self.exact and self.slot_dtype:
            raise ArgumentError(
                f"exact=True keeps stored values as they are, but slot_dtype is {self.slot_dtype!r}; leave one out"
            )
        limit = self.hoist_limit_mb
        if limit is not None and limit != math.inf:
            check_number("hoist_limit_mb", limit, what="megabytes", tail=", or None for no limit")
        if limit is not None:
            object.__setattr__(self, "hoist_limit_mb", float(limit))

    @property
    def packs(self) -> bool:
        """Whether linear maps on CPUs run with packed copies of their weights."""
        return self.backend == "inductor" and self.regions and self.prepack

    @property
    def storage(self) -> torch.dtype | None:
        """`slot_dtype` as torch has it."""
        return None if self.slot_dtype is None else getattr(torch, self.slot_dtype)
