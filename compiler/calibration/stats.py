"""What calibration measures, and its file."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepgraph.checked import check_fields, checked
from stepgraph.errors import ArgumentError, FileFormatError
from stepgraph.files.tensor_record import read_tensor_record, write_tensor_record
from stepgraph.plan import PlanHeader, Site
from stepgraph.plan.described import described_sites

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "stepgraph-stats"
VERSION = 2
CHANNELS = "channels/"


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """Statistics of a model's sites over real sampling runs, averaged over the samples.

    The properties average over the branches; `of_branch` gives the statistics of one.

    Attributes:
        header: Model, scheduler and steps they belong to, with seed and number of samples.
        sites: The model's sites, with the MACs of each.
        branches: "cond", or "cond" and "uncond" where the runs were guided.
        guidance_scale: Of the runs; 1 for none.
        conditioning: Digest of the conditioning that was passed in; empty for the family's example conditioning.
        tables: float64 tables by name: those of `table_shapes`, and `rate.<name>` for every rate metric.
        channels: Per-channel means of every linear map inside module sites, [C] float64 by `<module path>/<name>` with the
            names of `ChannelSums`; empty where they were not asked for.
        eta: Share of noise that the sampler put back.
    """

    header: PlanHeader
    sites: tuple[Site, ...]
    branches: tuple[str, ...]
    guidance_scale: float
    conditioning: str
    tables: Mapping[str, torch.Tensor]
    channels: Mapping[str, torch.Tensor] = field(default_factory=dict)
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "the statistics' ")
        measured = self.tables["mse"].shape[:1] if "mse" in self.tables else ()
        if measured and measured[0] != len(self.sites):
            raise ArgumentError(f"the statistics' sites are {len(self.sites)}; their tables are of {measured[0]}")

    @property
    def magnitude(self) -> torch.Tensor:
        """Mean absolute value of each site at each step, [T, sites]."""
        return self.tables["magnitude"].mean(0)

    @property
    def norm(self) -> torch.Tensor:
        """L2 norm of each site's whole value, [T, sites]."""
        return self.tables["norm"].mean(0)

    @property
    def change(self) -> torch.Tensor:
        """Mean absolute difference from k = 1..K steps before, [K, T, sites]; zero where s < k.

        This is the error that reusing a value over k steps would make.
        """
        return self.tables["change"].mean(0)

    @property
    def relative(self) -> torch.Tensor:
        """||Z_s - Z_(s-k)||_1 / ||Z_s||_1 for k = 1..K, [K, T, sites]; zero where s < k (SmoothCache, arXiv 2411.10510)."""
        return self.tables["relative"].mean(0)

    @property
    def relative_change(self) -> torch.Tensor:
        """Mean change over one step over mean magnitude, [T, sites]."""
        return self.change[0] / self.magnitude.clamp_min(1e-300)

    @property
    def ratio(self) -> torch.Tensor:
        """Mean over tokens of ||Z_s||_2 / ||Z_(s-1)||_2, [T, sites]; 1 in row 0 (MagCache, arXiv 2506.09045)."""
        return self.tables["ratio"].mean(0)

    @property
    def mse(self) -> torch.Tensor:
        """Mean squared difference of each site between any two steps, [sites, T, T], from a fixed sample of its elements."""
        return self.tables["mse"]

    @property
    def relative_mse(self) -> torch.Tensor:
        """`mse` of two steps over the mean of their mean squares, [sites, T, T], so that sites can be compared."""
        size = torch.finfo(getattr(torch, self.header.dtype)).bits // 8
        elements = torch.tensor([site.bytes // size for site in self.sites], dtype=torch.float64)
        squares = (self.norm**2 / elements).T  # [sites, T]
        return 2 * self.mse / (squares[:, :, None] + squares[:, None, :]).clamp_min(1e-300)

    @property
    def cosine(self) -> torch.Tensor:
        """Cosine similarity of each site between any two steps, [sites, T, T], from the same sample of its elements."""
        return self.tables["cosine"]

    @property
    def embedding(self) -> torch.Tensor:
        """||e_s - e_(s-1)||_1 / ||e_(s-1)||_1 of the timestep embedding, [T]; 0 in row 0; NaN where the family names none."""
        return self.tables["embedding"]

    @property
    def ms(self) -> torch.Tensor:
        """Milliseconds that a reuse of each site alone saves, [sites]: the operations it makes unnecessary, timed one by one.

        Measured eagerly, in one evaluation's batch, on the machine that calibrated: for comparing sites with one another.
        """
        return self.tables["ms"]

    @checked
    def rate(self, metric: str = "v1") -> torch.Tensor:
        """A rate of change, [T, sites] (see `rates`); 1 in the first and last row, where there is none.

        "lagged" is `relative` at lag 1: the error that a reuse really makes, in every row but the first.

        Raises:
            PlanError: These statistics have no such rate.
        """
        if metric == "lagged":
            return self.relative[0]
        if f"rate.{metric}" not in self.tables:
            known = ["lagged", *sorted(name.removeprefix("rate.") for name in self.tables if name.startswith("rate."))]
            raise ArgumentError(f"unknown metric {metric!r}; these statistics have {', '.join(known)}")
        return self.tables[f"rate.{metric}"].mean(0)

    @checked
    def of_branch(self, name: str) -> "CalibrationStats":
        """The statistics of one branch.

        Raises:
            PlanError: There is no such branch.
        """
        if name not in self.branches:
            raise ArgumentError(f"unknown branch {name!r}; these statistics have {', '.join(self.branches)}")
        at = self.branches.index(name)
        tables = {key: table if key in UNBRANCHED else table[at : at + 1] for key, table in self.tables.items()}
        return replace(self, branches=(name,), tables=tables)

    @checked
    def plot(self, path: str | Path | None = None) -> "Figure":
        """The invariance pictures of the papers; written to `path` where given (see `stats_plot`)."""
        from stepgraph.compiler.calibration.stats_plot import plot_stats

        return plot_stats(self, path)

    @checked
    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose metadata is the header as JSON; it appears whole or not at all."""
        described = {
            "header": asdict(self.header),
            "sites": list(map(asdict, self.sites)),
            "branches": self.branches,
            "guidance_scale": self.guidance_scale,
            "conditioning": self.conditioning,
            "eta": self.eta,
        }
        tensors = dict(self.tables) | {CHANNELS + name: value for name, value in self.channels.items()}
        write_tensor_record(path, FORMAT, VERSION, described, tensors)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> "CalibrationStats":
        """Read a file written by `save`.

        Raises:
            PlanError: The file is not a complete statistics file of this version.
        """
        described, tensors = read_tensor_record(path, FORMAT, VERSION, "make statistics with `stepgraph calibrate`")
        header, sites = described_sites(described, path)
        branches: Any = described.get("branches")
        scale, eta = described.get("guidance_scale"), described.get("eta")
        known = branches == ["cond"] or branches == ["cond", "uncond"]
        if not known or not isinstance(scale, (int, float)) or not isinstance(eta, (int, float)):
            raise FileFormatError(f"{path}: branches are {branches!r}, guidance_scale {scale!r}, eta {eta!r} in its metadata")
        rates = [name.removeprefix("rate.") for name in tensors if name.startswith("rate.")]
        lags = tensors["change"].shape[1] if "change" in tensors and tensors["change"].ndim == 4 else 1
        shapes = table_shapes(len(branches), len(header.timesteps), len(sites), rates, lags)
        for name, shape in shapes.items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                raise FileFormatError(f"{path}: {name} is not a table of shape {list(shape)}")
        channels = {n.removeprefix(CHANNELS): tensors[n] for n in tensors if n.startswith(CHANNELS)}
        tables = {name: tensors[name] for name in shapes}
        conditioning = str(described.get("conditioning", ""))
        return cls(header, sites, tuple(branches), float(scale), conditioning, tables, channels, float(eta))


UNBRANCHED = ("mse", "cosine", "embedding", "ms")


def table_shapes(branches: int, steps: int, sites: int, rates: Iterable[str], lags: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tables."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("magnitude", "norm", "ratio", *(f"rate.{name}" for name in rates)), (branches, steps, sites)
    )
    shapes |= dict.fromkeys(("change", "relative"), (branches, lags, steps, sites))
    return shapes | {
        "mse": (sites, steps, steps), "cosine": (sites, steps, steps), "embedding": (steps,), "ms": (sites,),
    }  # fmt: skip
