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
    """

    backend: str = "inductor"
    exact: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}; expected one of {', '.join(BACKENDS)}")
        if self.exact and self.backend != "eager":
            raise ValueError(f"exact=True keeps the eager operations, but backend is {self.backend!r}; pass backend='eager'")
