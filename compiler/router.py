"""Learning-to-Cache's routers: the trained record, its settings and its files (arXiv 2406.01733)."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stepgraph.files import save_tensors, whole_file
from stepgraph.plan import PlanError, PlanHeader, Site, parse_record

FORMAT = "stepgraph-router"
VERSION = 1
LOSSES = ("mean", "sum")
STATES = ("q_sample", "trajectory")


@dataclass(frozen=True)
class RouterSettings:
    """How routers are trained. The defaults are those of the paper's DiT code; `PRESETS` holds others.

    Attributes:
        lam: Weight of the computed share: the loss of a routed step is its squared error + lam * sum of its betas.
        lr: Learning rate of AdamW with betas (0.9, 0.999) and no weight decay.
        iterations: Updates of every router. The paper's checkpoints count 11.3 to 11.5 thousand per router.
        batch: Samples per iteration; every sample has a step of its own, in equal shares.
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
        for name, least in (("iterations", 1), ("batch", 1), ("pool", 1), ("run", 1), ("shift", 0), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise PlanError(f"{name} is {value!r}; expected a whole number of at least {least}")
        for name in ("lam", "lr", "init", "label_dropout", "clamp"):
            value = getattr(self, name)
            if name == "clamp" and value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name in ("lr", "clamp")):
                raise PlanError(f"{name} is {value!r}; expected a finite number {'above' if name in ('lr', 'clamp') else 'from'} 0")
        if self.label_dropout > 1:
            raise PlanError(f"label_dropout is {self.label_dropout!r}; expected a share in 0..1")
        for name, known in (("loss", LOSSES), ("states", STATES)):
            if getattr(self, name) not in known:
                raise PlanError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")


PRESETS: dict[str, dict[str, Any]] = {
    # The paper's DiT code.
    "dit": {},
    # The paper's U-ViT code: the squared error is summed, the logits are free, and the rhythm starts at evaluation 1.
    "u-vit": {"lam": 0.1, "loss": "sum", "clamp": None, "shift": 1, "iterations": 40_000},
    # Minutes on a CPU: logits start undecided and move fast enough to leave the start behind.
    "quick": {"lam": 1e-4, "lr": 5e-2, "iterations": 300, "batch": 32, "init": 0.0, "states": "trajectory"},
}


def settings_of(preset: str, changes: Mapping[str, Any] | None = None) -> RouterSettings:
    """A preset with some settings changed.

    Raises:
        PlanError: There is no such preset or setting, or a value is out of range.
    """
    if preset not in PRESETS:
        raise PlanError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    known = list(RouterSettings.__dataclass_fields__)
    unknown = sorted(set(changes or {}) - set(known))
    if unknown:
        raise PlanError(f"routers have no setting {unknown[0]!r}; known: {', '.join(known)}")
    return RouterSettings(**{**PRESETS[preset], **(changes or {})})


def full_steps(steps: int, run: int = 1, shift: int = 0) -> tuple[bool, ...]:
    """Which of T steps, in sampling order, compute everything; the others are routed.

    A step s is full where s < shift or (s - shift) is divisible by run + 1. With run 1 and shift 0 these are the steps
    0, 2, 4, ... The paper's code counts timestep indices upwards, i = T - 1 - s, and makes the odd ones full: for an even T the
    same steps. For an odd T its first step, i = T - 1, would be routed with nothing stored; here step 0 is full for every T, and
    the last step of an odd T has no routed step behind it.
    """
    return tuple(s < shift or (s - shift) % (run + 1) == 0 for s in range(steps))


@dataclass(frozen=True, eq=False)
class Router:
    """Trained routers of a model under a schedule.

    Attributes:
        header: Model, scheduler and steps they belong to.
        sites: The module sites, in the order of the columns.
        logits: [T, sites] float32 in sampling order; sigmoid is the weight beta of computing. Rows of full steps are not
            trained and keep their first values.
        settings: How they were trained.
        history: [iterations, 2] float64: squared error and sum of betas of a routed step, averaged over each batch.
    """

    header: PlanHeader
    sites: tuple[Site, ...]
    logits: torch.Tensor
    settings: RouterSettings = field(default_factory=RouterSettings)
    history: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.float64))

    def __post_init__(self) -> None:
        expected = (len(self.header.timesteps), len(self.sites))
        if tuple(self.logits.shape) != expected:
            raise PlanError(f"the logits are {list(self.logits.shape)}; expected {list(expected)}, steps x module sites")
        if not self.logits.isfinite().all():
            raise PlanError("the logits hold NaN or infinite values; train the routers again")

    @property
    def full(self) -> tuple[bool, ...]:
        """Which steps compute everything."""
        return full_steps(len(self.header.timesteps), self.settings.run, self.settings.shift)

    def reused(self, theta: float) -> torch.Tensor:
        """[T, sites] bool: what routed steps reuse, which is where sigmoid(logit) does not lie above theta."""
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 <= theta <= 1:
            raise PlanError(f"theta is {theta!r}; expected a probability in 0..1")
        return (torch.sigmoid(self.logits.float()) <= theta) & ~torch.tensor(self.full)[:, None]

    def refuse_other(self, header: PlanHeader, what: str) -> None:
        """Compare with the model and schedule that a plan is made for.

        Raises:
            PlanError: They are not the ones that the routers were trained for.
        """
        for name in ("model", "fingerprint", "scheduler", "scheduler_hash", "steps", "timesteps", "shapes", "dtype"):
            trained, wanted = getattr(self.header, name), getattr(header, name)
            if trained != wanted:
                raise PlanError(f"{what}: trained for {name} {trained}, but the plan is for {wanted}; train routers for it")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose metadata is the header as JSON; it appears whole or not at all."""
        write_record(path, FORMAT, self.header, self.sites, self.settings, {"logits": self.logits, "history": self.history})

    @classmethod
    def load(cls, path: str | Path) -> "Router":
        """Read a file written by `save`.

        Raises:
            PlanError: There is no such file, or it is not a complete router file of this version.
        """
        header, sites, settings, tensors, _ = read_record(path, FORMAT, ("logits", "history"))
        try:
            return cls(header, sites, tensors["logits"], settings, tensors["history"])
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def export(self, path: str | Path) -> None:
        """Write the checkpoint form of the paper's DiT code, which `import_plan` reads.

        `routers` is a list of T vectors of 2 x blocks logits by ascending timestep index, i = T - 1 - s; entry 2l is block l's
        attention and 2l + 1 its feed-forward. `args` is an argparse.Namespace.

        Raises:
            PlanError: The form cannot say it: other sites than these, an odd T, longer runs or a shifted rhythm.
        """
        steps, kinds = len(self.header.timesteps), [site.kind for site in self.sites]
        if kinds != ["attn", "ff"] * (len(kinds) // 2):
            raise PlanError(f"L2C's form holds attn and ff of each block in turn; the routers are of {', '.join(kinds[:6])}, ...")
        if steps % 2 or self.settings.run != 1 or self.settings.shift:
            raise PlanError(
                f"L2C's form holds pairs over an even number of steps, odd timestep indices full; the routers have T = {steps}, "
                f"run = {self.settings.run}, shift = {self.settings.shift}"
            )
        arguments = argparse.Namespace(num_sampling_steps=steps, l1=self.settings.lam, lr=self.settings.lr, seed=self.settings.seed)
        with whole_file(path) as partial:
            torch.save({"routers": [row.clone() for row in self.logits.flip(0)], "args": arguments}, partial)


def write_record(
    path: str | Path,
    form: str,
    header: PlanHeader,
    sites: tuple[Site, ...],
    settings: RouterSettings,
    tensors: Mapping[str, torch.Tensor],
    **extra: Any,
) -> None:
    """Write tensors with what they belong to as JSON metadata; the file appears whole or not at all."""
    described = {
        "format": form, "version": VERSION, "header": asdict(header), "sites": list(map(asdict, sites)),
        "settings": asdict(settings), **extra,
    }  # fmt: skip
    save_tensors(path, {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"stepgraph": json.dumps(described)})


def read_record(
    path: str | Path, form: str, names: tuple[str, ...]
) -> tuple[PlanHeader, tuple[Site, ...], RouterSettings, dict[str, torch.Tensor], dict[str, Any]]:
    """Header, sites, settings, tensors and all metadata of a file written by `write_record`.

    Raises:
        PlanError: The file is missing, cut short, or of another format or version.
    """
    if not Path(path).is_file():
        raise PlanError(f"no router file at {path}; train one with stepgraph.train_router(...) and Router.save")
    try:
        with safe_open(str(path), framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("stepgraph", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise PlanError(f"{path}: not a complete router file ({error})") from error
    found = (described.get("format"), described.get("version")) if isinstance(described, dict) else (None, None)
    if found != (form, VERSION):
        raise PlanError(f"{path}: expected {form} version {VERSION}; got {found[0]} {found[1]}")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise PlanError(f"{path}: the table {missing[0]!r} is missing")
    header = parse_record(PlanHeader, described.get("header"), f"{path}: header")
    sites = tuple(parse_record(Site, site, f"{path}: site {i}") for i, site in enumerate(described.get("sites") or ()))
    try:
        settings = RouterSettings(**described.get("settings", {}))
    except (TypeError, PlanError) as error:
        raise PlanError(f"{path}: settings: {error}") from error
    return header, sites, settings, tensors, described
