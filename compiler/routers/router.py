"""Learning-to-Cache's trained routers and their files (arXiv 2406.01733)."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepgraph.checked import check_fields, checked
from stepgraph.checks import check_number, is_finite
from stepgraph.compiler.routers.router_settings import RouterSettings, full_steps
from stepgraph.errors import FileFormatError, MismatchError, PlanError
from stepgraph.files.tensor_record import read_tensor_record, write_tensor_record
from stepgraph.files.whole_file import whole_file
from stepgraph.fingerprint import fingerprint
from stepgraph.plan import PlanHeader, Site
from stepgraph.plan.described import described_sites

FORMAT = "stepgraph-router"
VERSION = 1
# Of the header: what routers and a plan must have in common.
FACTS = ("model", "fingerprint", "scheduler", "scheduler_hash", "steps", "timesteps", "timestep", "shapes", "dtype")


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
        check_fields(self, "the router's ")
        expected = (len(self.header.timesteps), len(self.sites))
        if tuple(self.logits.shape) != expected:
            raise PlanError(f"the logits are {list(self.logits.shape)}; expected {list(expected)}, steps x module sites")
        if not is_finite(self.logits):
            raise PlanError("the logits hold NaN or infinite values, or none; train the routers again")

    @property
    def full(self) -> tuple[bool, ...]:
        """Which steps compute everything."""
        return full_steps(len(self.header.timesteps), self.settings.run, self.settings.shift)

    @checked
    def reused(self, theta: float) -> torch.Tensor:
        """[T, sites] bool: what routed steps reuse, which is where sigmoid(logit) does not lie above theta."""
        check_number("theta", theta, 0, 1, what="a probability")
        return (torch.sigmoid(self.logits.float()) <= theta) & ~torch.tensor(self.full)[:, None]

    @checked
    def refuse_other(self, header: PlanHeader, what: str, model: nn.Module | None = None) -> None:
        """Compare with the model and schedule that a plan is made for.

        Args:
            header: The plan's.
            what: The routers in words.
            model: That the header is of; routers of before there were sums of contents (`fingerprint`) cannot be compared
                without it.

        Raises:
            PlanError: They are not the ones that the routers were trained for.
        """
        for name in FACTS:
            trained, wanted = getattr(self.header, name), getattr(header, name)
            if name == "fingerprint" and model is not None:
                wanted = fingerprint(model, trained)
            if trained != wanted:
                raise MismatchError(f"{what}: trained for {name} {trained}, but the plan is for {wanted}; train routers for it")

    @checked
    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose metadata is the header as JSON; it appears whole or not at all."""
        write_router(path, FORMAT, self.header, self.sites, self.settings, {"logits": self.logits, "history": self.history})

    @classmethod
    @checked
    def load(cls, path: str | Path) -> "Router":
        """Read a file written by `save`.

        Raises:
            PlanError: There is no such file, or it is not a complete router file of this version.
        """
        header, sites, settings, tensors, _ = read_router(path, FORMAT, ("logits", "history"))
        try:
            return cls(header, sites, tensors["logits"], settings, tensors["history"])
        except PlanError as error:
            raise FileFormatError(f"{path}: {error}") from error

    @checked
    def export(self, path: str | Path) -> None:
        """Write the checkpoint form of the paper's DiT code, which `import_plan` reads.

        `routers` is a list of T vectors of 2 x blocks logits by ascending timestep index, i = T - 1 - s; entry 2l is block l's
        attention and 2l + 1 its feed-forward. `args` is an argparse.Namespace.

        Raises:
            PlanError: The form cannot say it: other sites than these, an odd T, longer runs or a shifted rhythm.
        """
        steps, kinds = len(self.header.timesteps), [site.kind for site in self.sites]
        if kinds != ["attn", "ff"] * (len(kinds) // 2):
            raise PlanError(
                f"L2C's form holds attn and ff of each block in turn; the routers are of {', '.join(kinds[:6])}, ..."
            )
        if steps % 2 or self.settings.run != 1 or self.settings.shift:
            raise PlanError(
                f"L2C's form holds pairs over an even number of steps, odd timestep indices full; the routers have "
                f"T = {steps}, run = {self.settings.run}, shift = {self.settings.shift}"
            )
        arguments = argparse.Namespace(
            num_sampling_steps=steps, l1=self.settings.lam, lr=self.settings.lr, seed=self.settings.seed
        )
        with whole_file(path) as partial:
            torch.save({"routers": [row.clone() for row in self.logits.flip(0)], "args": arguments}, partial)


def write_router(
    path: str | Path,
    form: str,
    header: PlanHeader,
    sites: tuple[Site, ...],
    settings: RouterSettings,
    tensors: Mapping[str, torch.Tensor],
    **extra: Any,
) -> None:
    """Write tensors with what they belong to; the file appears whole or not at all."""
    described = {"header": asdict(header), "sites": list(map(asdict, sites)), "settings": asdict(settings), **extra}
    write_tensor_record(path, form, VERSION, described, tensors)


def read_router(
    path: str | Path, form: str, names: tuple[str, ...]
) -> tuple[PlanHeader, tuple[Site, ...], RouterSettings, dict[str, torch.Tensor], dict[str, Any]]:
    """Header, sites, settings, tensors and all metadata of a file written by `write_router`.

    Raises:
        PlanError: The file is missing, cut short, or of another format or version.
    """
    described, tensors = read_tensor_record(path, form, VERSION, "train routers with `stepgraph plan train-router`")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise FileFormatError(f"{path}: the table {missing[0]!r} is missing")
    header, sites = described_sites(described, path)
    try:
        settings = RouterSettings(**described.get("settings", {}))
    except (TypeError, PlanError) as error:
        raise FileFormatError(f"{path}: settings: {error}") from error
    return header, sites, settings, tensors, described
