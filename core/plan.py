"""Cache plans: for every step and site of one sampling run, what is computed and what is reused.

A plan is data. It is validated when it is made and when it is read, so that whatever holds a `CachePlan` holds a valid
one. Actions are written as one letter each; a row of the plan is the string of all sites' letters at one step.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgraph.corrections import Forecast, Increment
from stepgraph.corrections import PlanError as PlanError
from stepgraph.files import whole_file
from stepgraph.plan_json import corrections_in, parse_record, without_duplicates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stepgraph.plan_report import PlanSummary

FORMAT = "stepgraph-plan"
VERSION = 1


class Action(str, Enum):
    """What happens to a site at a step. Only COMPUTE stores a value, and only where a later step reads it."""

    COMPUTE = "C"
    REUSE = "R"
    LOWRANK = "L"
    FORECAST = "F"
    DEAD = "."


COMPUTE, REUSE, LOWRANK, FORECAST, DEAD = (action.value for action in Action)
READS_STORED = frozenset((REUSE, LOWRANK, FORECAST))
# What is computed for such a value alone is not computed at all.
REPLACED = frozenset((REUSE, FORECAST))

MODULE_KINDS = ("attn", "context_attn", "cross_attn", "ff", "context_ff", "mlp", "proj_out")
STREAM_KINDS = ("block", "stack_residual", "hidden", "output")
KINDS = MODULE_KINDS + STREAM_KINDS
DTYPES = ("float64", "float32", "float16", "bfloat16")
BRANCHES = {"batched": ("all",), "separate": ("cond", "uncond"), "none": ("all",)}
# Counts above this are not real, and would not survive as floating-point numbers.
LARGEST = 2**63 - 1
# A stream value holds everything before it; only module sites consist of linear maps that can be corrected one by one.
POSSIBLE = {kind: frozenset("CRLF.") for kind in MODULE_KINDS} | {kind: frozenset("CRF.") for kind in STREAM_KINDS}


def _whole(name: str, value: Any, least: int) -> None:
    """Refuse what is not a whole number in least..LARGEST."""
    if type(value) is not int or not least <= value <= LARGEST:
        raise PlanError(f"{name} is {value!r}; expected a whole number of at least {least}")


@dataclass(frozen=True)
class Site:
    """A place whose value can be reused.

    Attributes:
        path: Module path inside the model; empty for the sites of the whole model (`hidden`, `stack_residual`,
            `output`).
        kind: One of `KINDS`.
        call: Which call of that module within one evaluation, counted from 0.
        output: Which of the call's outputs, counted from 0.
        macs: Multiply-accumulates per sample that a reuse of this site saves. What several outputs of one call save only
            together stands with the first of them, so that their sum is what reusing the call saves.
        bytes: Size of its stored value per sample, in the plan's dtype.
    """

    path: str
    kind: str
    call: int = 0
    output: int = 0
    macs: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"site {self.path!r} has kind {self.kind!r}; the kinds are {', '.join(KINDS)}")
        for name in ("call", "output", "macs", "bytes"):
            _whole(f"site {self.path or self.kind!r}: {name}", getattr(self, name), 0)

    @property
    def name(self) -> str:
        """Unique within a model: the path (or the kind, for the whole model), `#call` and `:output` where not 0."""
        call, output = f"#{self.call}" if self.call else "", f":{self.output}" if self.output else ""
        return (self.path or self.kind) + call + output


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

    def __post_init__(self) -> None:
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
        _whole("steps", self.steps, 1)
        _whole("macs", self.macs, 0)
        for size in (size for shape in self.shapes.values() for size in shape):
            _whole(f"a size in the input shapes {dict(self.shapes)}", size, 1)
        for name in ("model", "fingerprint", "scheduler", "scheduler_hash", "policy"):
            if not getattr(self, name):
                raise PlanError(f"the header's {name} is empty")
        if self.dtype not in DTYPES:
            raise PlanError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.guidance not in BRANCHES:
            raise PlanError(f"guidance is {self.guidance!r}; expected one of {', '.join(BRANCHES)}")
        if self.branches != BRANCHES[self.guidance]:
            raise PlanError(
                f"guidance {self.guidance!r} has the branches {list(BRANCHES[self.guidance])}; got {list(self.branches)}"
            )
        for name in ("seed", "samples"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0)


def first_live(sites: Sequence[Site], row: str) -> int:
    """Index of the first site that is not DEAD: a replaced stream value makes every site listed before it dead."""
    replaced = [i for i, site in enumerate(sites) if site.kind in STREAM_KINDS and row[i] in REPLACED]
    return replaced[-1] if replaced else 0


def containers(sites: Sequence[Site], row: str) -> dict[int, int]:
    """Index of every DEAD site -> index of the replaced site that it lies inside.

    Inside a stream value is whatever is listed before it; inside a FLUX single block's `proj_out` are the `attn` and `mlp` of
    that block, which nothing else reads.
    """
    live = first_live(sites, row)
    inside = dict.fromkeys(range(live), live)
    for i in range(live, len(sites)):
        if sites[i].kind == "proj_out" and row[i] in REPLACED:
            block = sites[i].path.rpartition(".")[0]
            parts = (j for j in range(live, i) if sites[j].kind in ("attn", "mlp"))
            inside |= {j: i for j in parts if sites[j].path.rpartition(".")[0] == block}
    return inside


def joint_calls(sites: Sequence[Site]) -> list[tuple[int, ...]]:
    """Indices of the sites that are outputs of one and the same call, for every call with more than one."""
    calls: dict[tuple[str, int], list[int]] = {}
    for i, site in enumerate(sites):
        if site.kind in MODULE_KINDS:
            calls.setdefault((site.path, site.call), []).append(i)
    return [tuple(members) for members in calls.values() if len(members) > 1]


@dataclass(frozen=True)
class CachePlan:
    """The matrix action[T][sites] with its header, valid by construction.

    Attributes:
        header: What the plan was made for.
        sites: In the order in which one evaluation produces their values.
        rows: T strings of one action letter per site, in canonical form: sites inside a reused site are DEAD, and the
            outputs of one call (a joint attention) are all computed or none is.
        forecasts: (step, site index) -> what a FORECAST is made of. A LOWRANK with an entry takes its increment around the
            forecast of its stored values, one without around the last ones.
        increments: Site index -> what a LOWRANK there costs, where the plan is bound to factors.

    Raises:
        PlanError: On construction, when something is wrong; the message names the step and the site.
    """

    header: PlanHeader
    sites: tuple[Site, ...]
    rows: tuple[str, ...]
    forecasts: Mapping[tuple[int, int], Forecast] = field(default_factory=dict)
    increments: Mapping[int, Increment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        object.__setattr__(self, "rows", tuple(self.rows))
        self._check_shape()
        stored, joint = [0] * len(self.sites), joint_calls(self.sites)
        for step, row in enumerate(self.rows):
            self._check_row(step, row)
            self._check_joint(step, row, joint)
            for i, action in enumerate(row):
                if action in READS_STORED and not stored[i]:
                    raise PlanError(
                        f"step {step}, site {self.sites[i].name}: {Action(action).name} before any COMPUTE, so nothing "
                        f"is stored to read; compute the site at an earlier step"
                    )
                if (step, i) in self.forecasts:
                    self._check_forecast(step, i, action, stored[i])
                stored[i] += action == COMPUTE
        for step, i in self.forecasts:
            if not (0 <= step < self.steps and 0 <= i < len(self.sites)):
                raise PlanError(
                    f"a forecast is given for step {step}, site number {i}; the plan has {self.steps} steps and "
                    f"{len(self.sites)} sites"
                )

    def _check_shape(self) -> None:
        names = [site.name for site in self.sites]
        if not names:
            raise PlanError("a plan needs at least one site; this one has none")
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise PlanError(f"site {twice[0]} is listed more than once")
        if len(self.rows) != self.steps:
            raise PlanError(f"the plan has {len(self.rows)} rows for the {self.steps} timesteps of its header")
        for step, row in enumerate(self.rows):
            if len(row) != len(self.sites):
                raise PlanError(f"step {step} has {len(row)} actions for {len(self.sites)} sites")

    def _check_row(self, step: int, row: str) -> None:
        inside = containers(self.sites, row)
        for i, (site, action) in enumerate(zip(self.sites, row, strict=True)):
            where = f"step {step}, site {site.name}"
            if action not in POSSIBLE[site.kind]:
                known = ", ".join(f"{a.value} ({a.name})" for a in Action if a.value in POSSIBLE[site.kind])
                raise PlanError(f"{where}: action {action!r} is not possible for kind {site.kind}; possible: {known}")
            if i in inside and action != DEAD:
                raise PlanError(
                    f"{where}: {Action(action).name} inside the reused site {self.sites[inside[i]].name}; it must be DEAD "
                    f"('.'), as CachePlan.build writes it"
                )
            if i not in inside and action == DEAD:
                raise PlanError(f"{where}: DEAD, but no reused site contains it; write C or R")

    def _check_joint(self, step: int, row: str, joint: Sequence[tuple[int, ...]]) -> None:
        for members in joint:
            corrected = [i for i in members if row[i] == LOWRANK]
            if corrected and len(corrected) < len(members):
                raise PlanError(
                    f"step {step}, site {self.sites[corrected[0]].name}: LOWRANK, but not all outputs of the same call are; "
                    f"the linear maps of a joint attention are corrected together"
                )
            fresh = [i for i in members if row[i] == COMPUTE]
            other = [i for i in members if row[i] in READS_STORED]
            if fresh and other:
                site, action = self.sites[other[0]], Action(row[other[0]])
                raise PlanError(
                    f"step {step}, site {site.name}: {action.name}, but {self.sites[fresh[0]].name} of the same call is "
                    f"computed; a joint attention is skipped only if all its outputs are reused: write one action for all of "
                    f"them, as CachePlan.build does"
                )

    def _check_forecast(self, step: int, i: int, action: str, stored: int) -> None:
        forecast, where = self.forecasts[step, i], f"step {step}, site {self.sites[i].name}"
        if action not in (FORECAST, LOWRANK):
            raise PlanError(
                f"{where}: a forecast is given for the action {Action(action).name}; it belongs to FORECAST or LOWRANK"
            )
        oldest = max((*forecast.ages, *forecast.inputs))
        if oldest > stored:
            raise PlanError(
                f"{where}: the forecast reads y{oldest}, but only {stored} values have been computed; use a lower order there"
            )
        if forecast.inputs and self.sites[i].kind != "output":
            raise PlanError(
                f"{where}: only a forecast of the model's output reads its input; the terms are {list(forecast.terms)}"
            )
        if forecast.per_channel and action == LOWRANK:
            raise PlanError(f"{where}: the forecast around which an increment is taken has one coefficient per term")
        if forecast.coefficients and len(forecast.coefficients) != len(self.header.branches):
            raise PlanError(
                f"{where}: the forecast has {len(forecast.coefficients)} rows of coefficients; expected one for each of the "
                f"branches {list(self.header.branches)}"
            )

    @classmethod
    def build(cls, header: PlanHeader, sites: Sequence[Site], actions: Mapping[str, str | Sequence[str]]) -> "CachePlan":
        """A plan from the actions over time of some sites or kinds; whatever is not named is computed at every step.

        Args:
            header: What the plan is for.
            sites: All sites of the model.
            actions: Site name or kind -> T letters, such as "CRCR". A site's own entry goes before its kind's.

        Raises:
            PlanError: A name that is neither a site nor a kind present in `sites`; a wrong length; an invalid plan.
        """
        known = {site.name for site in sites} | {site.kind for site in sites}
        for name, letters in actions.items():
            if name not in known:
                raise PlanError(f"unknown site or kind {name!r}; this model has {', '.join(sorted(known))}")
            if not isinstance(letters, Sequence) or not all(isinstance(letter, str) for letter in letters):
                raise PlanError(f"{name!r} has the actions {letters!r}; expected one letter per step, such as 'CRCR'")
            if len(letters) != len(header.timesteps):
                raise PlanError(f"{name!r} has {len(letters)} actions for {len(header.timesteps)} steps")
        everywhere = COMPUTE * len(header.timesteps)
        columns = [actions.get(site.name, actions.get(site.kind, everywhere)) for site in sites]
        # An Action is a string too, and its value the letter.
        rows = [
            "".join(str(getattr(column[step], "value", column[step])) for column in columns)
            for step in range(len(header.timesteps))
        ]
        return cls(header, tuple(sites), tuple(canonical(sites, row) for row in rows))

    @property
    def steps(self) -> int:
        """T, the number of model evaluations."""
        return len(self.header.timesteps)

    def action(self, step: int, site: str) -> Action:
        """The action of a site, by name, at a step."""
        return Action(self.rows[step][self.index(site)])

    def index(self, site: str) -> int:
        """Position of a site, by name."""
        names = [s.name for s in self.sites]
        if site not in names:
            raise PlanError(f"unknown site {site!r}; the sites are {', '.join(names)}")
        return names.index(site)

    def summary(self) -> "PlanSummary":
        """Counts per kind, MACs computed and total, ideal speed-up, peak bytes of stored values per sample."""
        from stepgraph.plan_report import summarize

        return summarize(self)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """The steps x sites heat map, one panel per kind; written to `path` where given."""
        from stepgraph.plan_plot import plot_plan

        return plot_plan(self, path)

    def resample(self, steps: int, scheduler: Any = None) -> "CachePlan":
        """The plan's pattern at another number of steps, with a warning: it is stretched, not calibrated.

        Every site computes the same share of the steps to within one row, densely and sparsely where it did in the run
        (`stepgraph.resample` states the rule). Without `scheduler` the timesteps are interpolated.
        """
        from stepgraph.resample import resample_plan

        return resample_plan(self, steps, scheduler)

    def to_json(self) -> str:
        """The plan as JSON, one line per header field and per site, so that plans can be compared by eye or by diff."""
        header = {"format": FORMAT, "version": VERSION, **asdict(self.header)}
        lines = [f'  "{key}": {json.dumps(value, allow_nan=False)}' for key, value in header.items()]
        # Most of a plan's forecasts are the same one.
        distinct = list(dict.fromkeys(self.forecasts.values()))
        if distinct:
            lines.append('  "forecasts": [\n' + ",\n".join(f"    {json.dumps(asdict(f))}" for f in distinct) + "\n  ]")
        records = []
        for i, site in enumerate(self.sites):
            record = asdict(site) | {"actions": "".join(row[i] for row in self.rows)}
            used = {str(step): distinct.index(forecast) for (step, j), forecast in self.forecasts.items() if j == i}
            record |= {"forecasts": used} if used else {}
            record |= {"increment": asdict(self.increments[i])} if i in self.increments else {}
            records.append(record)
        sites = ",\n".join(f"    {json.dumps(record)}" for record in records)
        return "{\n" + ",\n".join(lines) + ',\n  "sites": [\n' + sites + "\n  ]\n}\n"

    def save(self, path: str | Path) -> None:
        """Write the plan's JSON; the file appears whole or not at all."""
        with whole_file(path) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "CachePlan":
        """Read and validate a plan file; every error names the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise PlanError(f"no plan file at {path}; make one with `stepgraph plan make` or CachePlan.save") from error
        except IsADirectoryError as error:
            raise PlanError(f"{path} is a folder; expected a plan file") from error
        except (PlanError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "CachePlan":
        """Parse and validate a plan's JSON."""
        try:
            data = json.loads(text, object_pairs_hook=without_duplicates)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"not a complete JSON document ({error}); was the file cut short?") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f'not a plan: expected an object with "format": "{FORMAT}"')
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise PlanError(f"plan format version {data.get('version')!r}; this release reads version {VERSION}")
        records = data.pop("sites", None)
        if not isinstance(records, list):
            raise PlanError('the plan has no list "sites"')
        listed = data.pop("forecasts", [])
        if not isinstance(listed, list):
            raise PlanError(f"forecasts is {type(listed).__name__}; expected a list")
        distinct = [parse_record(Forecast, record, f"forecast {number}") for number, record in enumerate(listed)]
        known = {name: value for name, value in data.items() if name not in ("format", "version")}
        header = parse_record(PlanHeader, known, "header")
        forecasts, increments = corrections_in(records, distinct)
        columns: list[Any] = [record.pop("actions", None) if isinstance(record, dict) else None for record in records]
        sites = [parse_record(Site, record, f"site {number}") for number, record in enumerate(records)]
        for site, column in zip(sites, columns, strict=True):
            if not isinstance(column, str) or len(column) != len(header.timesteps):
                given = f"{len(column)} actions" if isinstance(column, str) else f"actions {column!r}"
                raise PlanError(f"site {site.name} has {given}; expected a string of {len(header.timesteps)} letters")
        rows = tuple("".join(column[step] for column in columns) for step in range(len(header.timesteps)))
        return cls(header, tuple(sites), rows, forecasts, increments)

    def with_header(self, **changes: Any) -> "CachePlan":
        """The same actions under a header with some fields changed."""
        return replace(self, header=replace(self.header, **changes))


def canonical(sites: Sequence[Site], row: str) -> str:
    """The row with every site inside a reused site DEAD, and all outputs of a call computed where one of them is."""
    letters = list(row)
    for members in joint_calls(sites):
        if any(letters[i] == COMPUTE for i in members):
            for i in members:
                letters[i] = COMPUTE if letters[i] in READS_STORED else letters[i]
    for i in containers(sites, "".join(letters)):
        letters[i] = DEAD
    return "".join(letters)
