"""What calibration measures, and its file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from stepgraph.files import save_tensors
from stepgraph.plan import PlanError, PlanHeader, Site, parse_record

FORMAT = "stepgraph-stats"
VERSION = 1
LAGS = 3


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """Statistics of a model's sites over real sampling runs, averaged over the samples.

    Attributes:
        header: Model, scheduler and steps they belong to, with seed and number of samples.
        sites: The model's sites.
        magnitude: Mean absolute value of each site at each step, [T, sites] float64.
        change: Mean absolute difference from the step before, [T, sites] float64; row 0 is zero. This is the error that
            reusing the last value would make.
        rate: InvarDiff's rate of change, [T, sites] float64: how far the value moves in the next step over how far it moved
            in this one, in L1 over the whole tensor (arXiv 2512.05134, metric v1); 1 in the first and the last row.
        relative: ||Z_s - Z_(s-k)||_1 / ||Z_s||_1 at the lags k = 1..3, [3, T, sites] float64 (SmoothCache, arXiv 2411.10510);
            zero where s < k.
        ratio: Mean over tokens of ||Z_s||_2 / ||Z_(s-1)||_2, [T, sites] float64 (MagCache, arXiv 2506.09045); 1 in row 0.
    """

    header: PlanHeader
    sites: tuple[Site, ...]
    magnitude: torch.Tensor
    change: torch.Tensor
    rate: torch.Tensor
    relative: torch.Tensor
    ratio: torch.Tensor

    @property
    def relative_change(self) -> torch.Tensor:
        """`change` over `magnitude`, [T, sites] float64."""
        return self.change / self.magnitude.clamp_min(1e-300)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose metadata is the header as JSON; it appears whole or not at all."""
        described = {
            "format": FORMAT,
            "version": VERSION,
            "header": asdict(self.header),
            "sites": list(map(asdict, self.sites)),
        }
        tensors = {name: getattr(self, name).contiguous() for name in table_shapes(0, 0)}
        save_tensors(path, tensors, {"stepgraph": json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationStats":
        """Read a file written by `save`.

        Raises:
            PlanError: The file is not a complete statistics file of this version.
        """
        if not Path(path).is_file():
            raise PlanError(f"no statistics file at {path}; make one with `stepgraph calibrate`")
        try:
            with safe_open(str(path), framework="pt") as file:
                described = json.loads((file.metadata() or {}).get("stepgraph", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise PlanError(f"{path}: not a complete statistics file ({error})") from error
        if not isinstance(described, dict):
            raise PlanError(f"{path}: its metadata is not an object")
        if described.get("format") != FORMAT or described.get("version") != VERSION:
            raise PlanError(
                f"{path}: expected {FORMAT} version {VERSION}; got {described.get('format')} {described.get('version')}"
            )
        header = parse_record(PlanHeader, described.get("header"), f"{path}: header")
        sites = tuple(parse_record(Site, site, f"{path}: site {i}") for i, site in enumerate(described.get("sites") or ()))
        for name, shape in table_shapes(len(header.timesteps), len(sites)).items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                raise PlanError(f"{path}: {name} is not a table of shape {list(shape)}")
        return cls(header, sites, **{name: tensors[name] for name in table_shapes(0, 0)})


def table_shapes(steps: int, sites: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tables."""
    lags = {"relative": (LAGS, steps, sites)}
    return {name: lags.get(name, (steps, sites)) for name in ("magnitude", "change", "rate", "relative", "ratio")}
