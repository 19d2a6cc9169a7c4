"""Reading a plan's JSON: records of named and typed fields, and what sites say about their corrections."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from stepgraph.checks import is_whole
from stepgraph.errors import FileFormatError
from stepgraph.plan.corrections import Forecast, Increment


def corrections_in(
    records: Sequence[Any], distinct: Sequence[Forecast]
) -> tuple[dict[tuple[int, int], Forecast], dict[int, Increment]]:
    """Take what the sites' parsed JSON says about corrections out of it."""
    forecasts: dict[tuple[int, int], Forecast] = {}
    increments: dict[int, Increment] = {}
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            continue
        used = record.pop("forecasts", {})
        if not isinstance(used, dict):
            raise FileFormatError(f"site {i}: forecasts is {used!r}; expected an object of step -> number of a forecast")
        for step, index in used.items():
            if not step.isascii() or not step.isdigit() or not is_whole(index, 0, len(distinct) - 1):
                raise FileFormatError(
                    f"site {i}: forecasts has {step!r}: {index!r}; expected a step and the number of one of the "
                    f"{len(distinct)} forecasts"
                )
            forecasts[int(step), i] = distinct[index]
        if "increment" in record:
            increments[i] = parse_record(Increment, record.pop("increment"), f"site {i}: increment")
    return forecasts, increments


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless it says two things under one name."""
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise FileFormatError(f"the key {twice[0]!r} appears more than once in one object")
    return dict(pairs)


# What the parsed JSON of a field must be (and each member of it); every field that is not listed is a string.
WHOLE = (int, object)
FIELD_TYPES: dict[str, tuple[Any, Any]] = {
    "steps": WHOLE, "macs": WHOLE, "call": WHOLE, "output": WHOLE, "bytes": WHOLE,
    "seed": ((int, type(None)), object), "samples": ((int, type(None)), object),
    "timesteps": (list, (int, float)), "branches": (list, str), "shapes": (dict, list), "arguments": (dict, object),
    "sigmas": (list, (int, float)), "mu": ((int, float, type(None)), object), "begin": WHOLE,
    "schedule": (dict, object), "timestep": ((dict, type(None)), object), "operations": (list, str),
    "terms": (list, str), "coefficients": (list, list), "ranks": (dict, int), "saved": WHOLE, "projection": WHOLE,
    "facts": (dict, str),
}  # fmt: skip


def _is(value: Any, expected: Any) -> bool:
    """isinstance, where true and false are no numbers."""
    return expected is object or (isinstance(value, expected) and not isinstance(value, bool))


def parse_record(kind: Any, values: Any, what: str) -> Any:
    """A dataclass from parsed JSON; unknown, missing and wrongly typed fields are refused by name."""
    if not isinstance(values, dict):
        raise FileFormatError(f"{what} is {type(values).__name__}; expected an object")
    expected = [f.name for f in fields(kind)]
    unknown = sorted(set(values) - set(expected))
    if unknown:
        raise FileFormatError(f"{what} has the unknown key {unknown[0]!r}; the keys are {', '.join(expected)}")
    for name, value in values.items():
        outer, inner = FIELD_TYPES.get(name, (str, object))
        members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, bool) or not isinstance(value, outer) or not all(_is(m, inner) for m in members):
            raise FileFormatError(f"{what}: {name} is {value!r:.200}, which is not of the type this field has")
    try:
        return kind(**values)
    except TypeError as error:
        raise FileFormatError(f"{what} is incomplete: {error}") from error
