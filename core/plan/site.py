"""Where values can be reused, and what may happen there: sites, their kinds, and the actions of a plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from stepgraph.checked import check_fields, checked
from stepgraph.checks import check_whole, shown
from stepgraph.errors import ArgumentError, PlanError


class Action(str, Enum):
    """What happens to a site at a step. Only COMPUTE stores a value, and only where a later step reads it."""

    COMPUTE = "C"
    REUSE = "R"
    LOWRANK = "L"
    FORECAST = "F"
    DEAD = "."

    @classmethod
    def _missing_(cls, value: object) -> "Action":
        known = ", ".join(f"{action.value!r} ({action.name})" for action in cls)
        raise ArgumentError(f"an action is {shown(value)}; expected one of {known}")


COMPUTE, REUSE, LOWRANK, FORECAST, DEAD = (action.value for action in Action)
READS_STORED = frozenset((REUSE, LOWRANK, FORECAST))
# What is computed for such a value alone is not computed at all.
REPLACED = frozenset((REUSE, FORECAST))

MODULE_KINDS = (
    "attn", "context_attn", "cross_attn", "ff", "context_ff", "mlp", "proj_out", "modal_attn", "audio_attn", "audio_cross_attn",
    "audio_ff",
)  # fmt: skip
STREAM_KINDS = ("block", "stack_residual", "hidden", "output")
KINDS = MODULE_KINDS + STREAM_KINDS
# A stream value holds everything before it; only module sites consist of linear maps that can be corrected one by one.
POSSIBLE = {kind: frozenset("CRLF.") for kind in MODULE_KINDS} | {kind: frozenset("CRF.") for kind in STREAM_KINDS}


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
        check_fields(self, "a site's ")
        if self.kind not in KINDS:
            raise PlanError(f"site {self.path!r} has kind {self.kind!r}; the kinds are {', '.join(KINDS)}")
        for name in ("call", "output", "macs", "bytes"):
            check_whole(f"site {self.path or self.kind!r}: {name}", getattr(self, name), 0)

    @property
    def name(self) -> str:
        """Unique within a model: the path (or the kind, for the whole model), `#call` and `:output` where not 0."""
        call, output = f"#{self.call}" if self.call else "", f":{self.output}" if self.output else ""
        return (self.path or self.kind) + call + output


@checked
def first_live(sites: Sequence[Site], row: str) -> int:
    """Index of the first site that is not DEAD: a replaced stream value makes every site listed before it dead."""
    _refuse_other_length(sites, row)
    replaced = [i for i, site in enumerate(sites) if site.kind in STREAM_KINDS and row[i] in REPLACED]
    return replaced[-1] if replaced else 0


@checked
def containers(sites: Sequence[Site], row: str) -> dict[int, int]:
    """Index of every DEAD site -> index of the replaced site that it lies inside.

    Inside a stream value is whatever is listed before it; inside a FLUX single block's `proj_out` are the attention and `mlp`
    of that block, which nothing else reads.
    """
    live = first_live(sites, row)
    inside = dict.fromkeys(range(live), live)
    for i in range(live, len(sites)):
        if sites[i].kind == "proj_out" and row[i] in REPLACED:
            block = sites[i].path.rpartition(".")[0]
            parts = (j for j in range(live, i) if sites[j].kind in ("attn", "context_attn", "mlp"))
            inside |= {j: i for j in parts if sites[j].path.rpartition(".")[0] == block}
    return inside


@checked
def joint_calls(sites: Sequence[Site]) -> list[tuple[int, ...]]:
    """Indices of the sites that are outputs of one and the same call, for every call with more than one."""
    calls: dict[tuple[str, int], list[int]] = {}
    for i, site in enumerate(sites):
        if site.kind in MODULE_KINDS:
            calls.setdefault((site.path, site.call), []).append(i)
    return [tuple(members) for members in calls.values() if len(members) > 1]


@checked
def canonical(sites: Sequence[Site], row: str) -> str:
    """The row with every site inside a reused site DEAD, and all outputs of a call computed where one of them is."""
    _refuse_other_length(sites, row)
    letters = list(row)
    for members in joint_calls(sites):
        if any(letters[i] == COMPUTE for i in members):
            for i in members:
                letters[i] = COMPUTE if letters[i] in READS_STORED else letters[i]
    for i in containers(sites, "".join(letters)):
        letters[i] = DEAD
    return "".join(letters)


def _refuse_other_length(sites: Sequence[Site], row: str) -> None:
    if len(row) != len(sites):
        raise ArgumentError(f"a row is {shown(row)}, {len(row)} actions for {len(sites)} sites; expected one letter per site")
