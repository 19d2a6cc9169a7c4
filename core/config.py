"""How a plan is compiled."""

from dataclasses import dataclass

BACKENDS = ("eager", "inductor")


class CompileError(RuntimeError):
    """A model and plan that cannot be compiled, or an executable that cannot be used as asked."""


@dataclass(frozen=True)
class CompileConfig:
    """Options of `stepgraph.compile`.

    Attributes:
        backend: "inductor" compiles each variant with torch.compile; "eager" runs its generated Python as it is.
        exact: Keep every operation and its order, so that results are bit-equal to the eager model; needs "eager".
        hoist: Compute what depends on the prompt or the timestep alone before the loop; with `exact`, at every step.
        hoist_limit_mb: Most megabytes of such values per branch; the largest stay in the loop beyond it.
        regions: With "inductor", compile each distinct piece of the variants once; else each whole variant.
        prepack: In regions on CPUs, give linear maps a copy of their weights in the layout of oneDNN.
        max_autotune: Let inductor time its kernels against each other; compiling then takes minutes.
    """

    backend: str = "inductor"
    exact: bool = False
    hoist: bool = True
    hoist_limit_mb: float | None = None
    regions: bool = True
    prepack: bool = True
    max_autotune: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}; expected one of {', '.join(BACKENDS)}")
        if self.exact and self.backend != "eager":
            raise ValueError(f"exact=True keeps the eager operations, but backend is {self.backend!r}; pass backend='eager'")
        if self.hoist_limit_mb is not None and not self.hoist_limit_mb >= 0:
            raise ValueError(f"hoist_limit_mb is {self.hoist_limit_mb!r}; expected megabytes, 0 or more, or None for no limit")
