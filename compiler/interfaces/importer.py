"""What an importer of a published plan format is."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepgraph.checks import check_number
from stepgraph.errors import FileFormatError, MismatchError, PlanError
from stepgraph.plan import COMPUTE, MODULE_KINDS, REUSE, CachePlan, Site


@dataclass(frozen=True)
class Importer:
    """One published format.

    Attributes:
        recognizes: Whether parsed file contents are of this format.
        actions: (contents, sites, T, **options) -> actions over time by site or kind, as `CachePlan.build` takes them.
        source: Where the format comes from.
    """

    recognizes: Callable[[Any], bool]
    actions: Callable[..., Mapping[str, str]]
    source: str


def is_flag(value: Any) -> bool:
    """Whether a value from a file is true, false, 0 or 1."""
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def check_table(name: str, table: Any, rows: int, columns: int | None = None) -> list[Any]:
    """A list of `rows` flags, or of `rows` lists of `columns` flags, as it came from a file.

    Raises:
        PlanError: The message names the key and the shape that was expected.
    """
    expected = f"[{rows}]" if columns is None else f"[{rows}][{columns}]"
    if not isinstance(table, list):
        raise MismatchError(f"{name} is {type(table).__name__}; expected {expected} for this model and number of steps")
    refuse_other_length(name, len(table), rows)
    for position, entry in enumerate(table):
        if columns is not None and (not isinstance(entry, list) or len(entry) != columns):
            got = f"a list of {len(entry)}" if isinstance(entry, list) else repr(entry)
            raise MismatchError(f"{name}[{position}] is {got}; expected {expected} for this model and number of steps")
        flags = entry if isinstance(entry, list) else [entry]
        bad = [flag for flag in flags if not is_flag(flag)]
        if bad:
            raise FileFormatError(f"{name}[{position}] holds {bad[0]!r}; expected true/false or 0/1")
    return table


def refuse_other_length(name: str, length: int, steps: int, entries: str = "entries") -> None:
    """A file's list has one entry per model evaluation.

    Raises:
        PlanError: It has more or fewer; the message says how to come to a plan of the steps that are wanted.
    """
    if length != steps:
        raise MismatchError(
            f"{name} holds {length} {entries}; expected {steps}, one per step; import it for the steps that it was made for, "
            f"and stretch that plan with plan.resample({steps}, scheduler) (stepgraph plan resample)"
        )


def letters(reused: Sequence[Any]) -> str:
    """One letter per step from flags that are true where the value is reused."""
    return "".join(REUSE if flag else COMPUTE for flag in reused)


def sites_of(sites: Sequence[Site], kind: str) -> list[Site]:
    """The sites of a kind, in model order."""
    return [site for site in sites if site.kind == kind]


def refuse_other_kinds(format_name: str, sites: Sequence[Site], kinds: set[str]) -> None:
    """A format of certain module kinds fits models that have exactly these; `proj_out` may be there beside them.

    Raises:
        PlanError: The message names the kinds that the format speaks of and those that the model has.
    """
    present = {site.kind for site in sites if site.kind in MODULE_KINDS} - {"proj_out"}
    if present != kinds:
        raise MismatchError(
            f"{format_name} is for models with the module kinds {', '.join(sorted(kinds))}; this model has "
            f"{', '.join(sorted(present))}"
        )


def refuse_more_than_reuse(format_name: str, plan: CachePlan, kinds: set[str]) -> None:
    """A format that can say whether sites of some kinds are reused, and no more.

    Raises:
        PlanError: The plan has other actions, or reuses sites of other kinds; the message names the site.
    """
    for i, site in enumerate(plan.sites):
        letters = {row[i] for row in plan.rows}
        if letters & {"L", "F"} or (REUSE in letters and site.kind not in kinds):
            raise PlanError(
                f"{format_name} holds reuse of {', '.join(sorted(kinds))} only; this plan has "
                f"{', '.join(sorted(letters - {COMPUTE}))} at {site.name}"
            )


def skipped(name: str, logits: Any, width: int, theta: Any) -> torch.Tensor:
    """Which modules a Learning-to-Cache router skips: those with sigmoid(logit) <= theta; [width] bool.

    Raises:
        PlanError: `logits` is no vector of `width` numbers, or `theta` is outside 0..1.
    """
    check_number("theta", theta, 0, 1, what="a probability")
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (width,):
        shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise MismatchError(f"{name} is {shape}; expected [{width}], two logits per block")
    if not logits.is_floating_point():
        raise FileFormatError(f"{name} is of dtype {logits.dtype}; expected floating-point logits")
    if not logits.isfinite().all():
        raise FileFormatError(f"{name} holds {int((~logits.isfinite()).sum())} logits that are NaN or infinite")
    reused: torch.Tensor = torch.sigmoid(logits.float()) <= theta
    return reused


def router_letters(sites: Sequence[Site], reused: Sequence[torch.Tensor]) -> dict[str, str]:
    """Actions by site from T masks [2 x blocks] in sampling order: entry 2l is block l's attention, 2l + 1 its feed-forward."""
    table = torch.stack(list(reused))
    by_part = {part: sites_of(sites, kind) for part, kind in enumerate(("attn", "ff"))}
    return {site.name: letters(table[:, 2 * i + part].tolist()) for part in by_part for i, site in enumerate(by_part[part])}


def keys_in_order(data: Mapping[Any, Any]) -> list[Any]:
    """The keys by the number that each of them holds.

    Raises:
        PlanError: The numbers are not 0..N - 1.
    """
    numbers = {key: [int(digits) for digits in re.findall(r"\d+", str(key))] for key in data}
    if sorted(n for key_numbers in numbers.values() for n in key_numbers) != list(range(len(data))):
        raise FileFormatError(
            f"the routers' keys are {', '.join(map(str, list(data)[:4]))}, ...; expected one number from 0 to {len(data) - 1} "
            f"in each"
        )
    return sorted(data, key=lambda key: numbers[key][0])
