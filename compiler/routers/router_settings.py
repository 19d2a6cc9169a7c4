"""How Learning-to-Cache's routers are trained, and which steps they route (arXiv 2406.01733)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepgraph.checked import check_fields
from stepgraph.checks import check_number, check_whole
from stepgraph.errors import ArgumentError

LOSSES = ("mean", "sum")
STATES = ("q_sample", "trajectory")


@dataclass(frozen=True)
class RouterSettings:
    """How routers are trained. The defaults are those of the paper's DiT code; `PRESETS` holds others.

    Attributes:
        lam: Weight of the computed share: the loss of a routed step is its squared error + lam * sum of its betas.
        lr: Learning rate of AdamW with betas (0.9, 0.999) and no weight decay.
        iterations: Updates of every router. The paper's checkpoints count 11.3 to 11.5 thousand per router.
        batch: Samples per iteration; the routed steps take turns among the samples.
        init: Standard deviation of the first logits.
        clamp: Logits are kept within -clamp..clamp; None leaves them free, as the U-ViT code does.
        label_dropout: Share of samples that are conditioned as the unconditional half is.
        loss: "mean" of the squared error over the whole output (DiT), or its "sum" (U-ViT); then the mean over samples.
        states: Where the states x_t come from: "q_sample" noises clean latents, as the paper does; "trajectory" takes those
            of real sampling runs, which any deterministic scheduler has.
        pool: Number of clean latents or sampling runs to train on, made by the model itself; not used where `data` is given.
        run: Routed steps after each full one. The paper's pairs are 1; longer runs are unrolled, and what a routed step
            computes refreshes what the next one reads.
        shift: The first full step of the rhythm; steps before it are full too. 0 for pairs from the first step on (DiT), 1 for
            the U-ViT code under DPM-Solver-2, where the odd evaluations are full and the even ones after them routed.
        seed: Of the logits, the pool and the batches.
    """

    lam: float = 5e-6
    lr: float = 1e-3
    iterations: int = 11_400
    batch: int = 64
    init: float = 1.0
    clamp: float | None = 5.0
    label_dropout: float = 0.1
    loss: str = "mean"
    states: str = "q_sample"
    pool: int = 256
    run: int = 1
    shift: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("iterations", 1), ("batch", 1), ("pool", 1), ("run", 1), ("shift", 0), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        check_number("lam", self.lam)
        check_number("lr", self.lr, above=0)
        check_number("init", self.init)
        check_number("label_dropout", self.label_dropout, 0, 1, what="a share")
        if self.clamp is not None:
            check_number("clamp", self.clamp, above=0, tail=", or None for free logits")
        for name, known in (("loss", LOSSES), ("states", STATES)):
            if getattr(self, name) not in known:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")


PRESETS: dict[str, dict[str, Any]] = {
    # The paper's DiT code.
    "dit": {},
    # The paper's U-ViT code: the squared error is summed, the logits are free, and the rhythm starts at evaluation 1. Its
    # states are noised images; a solver with a history needs those of real runs.
    "u-vit": {"states": "trajectory", "lam": 0.1, "loss": "sum", "clamp": None, "shift": 1, "iterations": 40_000},
    # Minutes on a CPU: logits start undecided and move fast enough to leave the start behind.
    "quick": {"lam": 1e-4, "lr": 5e-2, "iterations": 300, "batch": 32, "init": 0.0, "states": "trajectory"},
}


def settings_of(preset: str, changes: Mapping[str, Any] | None = None) -> RouterSettings:
    """A preset with some settings changed.

    Raises:
        PlanError: There is no such preset or setting, or a value is out of range.
    """
    if preset not in PRESETS:
        raise ArgumentError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    known = list(RouterSettings.__dataclass_fields__)
    unknown = sorted(set(changes or {}) - set(known))
    if unknown:
        raise ArgumentError(f"routers have no setting {unknown[0]!r}; known: {', '.join(known)}")
    return RouterSettings(**{**PRESETS[preset], **(changes or {})})


def full_steps(steps: int, run: int = 1, shift: int = 0) -> tuple[bool, ...]:
    """Which of T steps, in sampling order, compute everything; the others are routed.

    A step s is full where s < shift or (s - shift) is divisible by run + 1. With run 1 and shift 0 these are the steps
    0, 2, 4, ... The paper's code counts timestep indices upwards, i = T - 1 - s, and makes the odd ones full: for an even T the
    same steps. For an odd T its first step, i = T - 1, would be routed with nothing stored; here step 0 is full for every T,
    and the last step of an odd T has no routed step behind it.
    """
    return tuple(s < shift or (s - shift) % (run + 1) == 0 for s in range(steps))
