"""Cache plans: for every step and site of one sampling run, what is computed and what is reused.

A plan is data. It is validated when it is made and when it is read, so that whatever holds a `CachePlan` holds a valid
one. Actions are written as one letter each; a row of the plan is the string of all sites' letters at one step.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgraph.checked import check_fields, checked
from stepgraph.checks import check_whole, is_whole, shown
from stepgraph.errors import ArgumentError, FileFormatError, PlanError
from stepgraph.files.whole_file import whole_file
from stepgraph.plan.corrections import Forecast, Increment
from stepgraph.plan.header import ANY, PlanHeader
from stepgraph.plan.json import corrections_in, parse_record, without_duplicates
from stepgraph.plan.site import (
    COMPUTE,
    DEAD,
    FORECAST,
    LOWRANK,
    POSSIBLE,
    READS_STORED,
    Action,
    Site,
    canonical,
    containers,
    joint_calls,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stepgraph.plan.report import PlanSummary

FORMAT = "stepgraph-plan"
VERSION = 1


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
        check_fields(self, "the plan's ")
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
    @checked
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
                raise ArgumentError(f"unknown site or kind {name!r}; this model has {', '.join(sorted(known))}")
            if not isinstance(letters, Sequence) or not all(isinstance(letter, str) for letter in letters):
                raise ArgumentError(f"{name!r} has the actions {letters!r}; expected one letter per step, such as 'CRCR'")
            if len(letters) != len(header.timesteps):
                raise ArgumentError(f"{name!r} has {len(letters)} actions for {len(header.timesteps)} steps")
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

    @checked
    def action(self, step: int, site: str) -> Action:
        """The action of a site, by name, at a step."""
        check_whole("step", step, 0, self.steps - 1)
        return Action(self.rows[step][self.index(site)])

    @checked
    def index(self, site: str) -> int:
        """Position of a site, by name."""
        names = [s.name for s in self.sites]
        if site not in names:
            raise ArgumentError(f"unknown site {shown(site)}; the sites are {', '.join(names)}")
        return names.index(site)

    def summary(self) -> "PlanSummary":
        """Counts per kind, MACs computed and total, ideal speed-up, peak bytes of stored values per sample."""
        from stepgraph.plan.report import summarize

        return summarize(self)

    @checked
    def plot(self, path: str | Path | None = None) -> "Figure":
        """The steps x sites heat map, one panel per kind; written to `path` where given."""
        from stepgraph.plan.plot import plot_plan

        return plot_plan(self, path)

    @checked
    def resample(self, steps: int, scheduler: Any = None) -> "CachePlan":
        """The plan's pattern at another number of steps, with a warning: it is stretched, not calibrated.

        Every site computes the same share of the steps to within one row, densely and sparsely where it did in the run
        (`stepgraph.plan.resample` states the rule). Without `scheduler` the timesteps are interpolated.
        """
        from stepgraph.plan.resample import resample_plan

        return resample_plan(self, steps, scheduler)

    @checked
    def tail(self, begin: int) -> "CachePlan":
        """The plan of a run that begins at a later step: what it would read that is not stored then is computed.

        Raises:
            PlanError: `begin` is no step of the plan, or a forecast's coefficients are for values that the run does not have.
        """
        from stepgraph.plan.tail import tail_plan

        return tail_plan(self, begin)

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

    @checked
    def save(self, path: str | Path) -> None:
        """Write the plan's JSON; the file appears whole or not at all."""
        with whole_file(path) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    @checked
    def load(cls, path: str | Path) -> "CachePlan":
        """Read and validate a plan file; every error names the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise PlanError(f"no plan file at {path}; make one with `stepgraph plan make` or CachePlan.save") from error
        except OSError as error:
            what = "is a folder" if Path(path).is_dir() else f"cannot be read ({error.strerror})"
            raise PlanError(f"{path} {what}; expected a plan file") from error
        except (PlanError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{path}: {error}") from error

    @classmethod
    @checked
    def from_json(cls, text: str) -> "CachePlan":
        """Parse and validate a plan's JSON."""
        try:
            data = json.loads(text, object_pairs_hook=without_duplicates)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"not a complete JSON document ({error}); was the file cut short?") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FileFormatError(f'not a plan: expected an object with "format": "{FORMAT}"')
        if not is_whole(data.get("version"), VERSION, VERSION):
            raise FileFormatError(f"plan format version {data.get('version')!r}; this release reads version {VERSION}")
        records = data.pop("sites", None)
        if not isinstance(records, list):
            raise FileFormatError('the plan has no list "sites"')
        listed = data.pop("forecasts", [])
        if not isinstance(listed, list):
            raise FileFormatError(f"forecasts is {type(listed).__name__}; expected a list")
        distinct = [parse_record(Forecast, record, f"forecast {index}") for index, record in enumerate(listed)]
        known = {name: value for name, value in data.items() if name not in ("format", "version")}
        header = parse_record(PlanHeader, known, "header")
        forecasts, increments = corrections_in(records, distinct)
        columns: list[Any] = [record.pop("actions", None) if isinstance(record, dict) else None for record in records]
        sites = [parse_record(Site, record, f"site {index}") for index, record in enumerate(records)]
        for site, column in zip(sites, columns, strict=True):
            if not isinstance(column, str) or len(column) != len(header.timesteps):
                got = f"{len(column)} actions" if isinstance(column, str) else f"actions {column!r}"
                raise FileFormatError(f"site {site.name} has {got}; expected a string of {len(header.timesteps)} letters")
        rows = tuple("".join(column[step] for column in columns) for step in range(len(header.timesteps)))
        return cls(header, tuple(sites), rows, forecasts, increments)

    def with_header(self, **changes: Any) -> "CachePlan":
        """The same actions under a header with some fields changed."""
        return replace(self, header=replace(self.header, **changes))

    def for_any_adapters(self) -> "CachePlan":
        """The same plan, declared to hold for any LoRA of its model.

        What was measured with the present adapters, or without, then counts for others too: with others it is followed with one
        warning, also by a plan whose numbers were measured.
        """
        return self.with_header(adapters=f"{ANY} {self.header.made_with}".strip())
