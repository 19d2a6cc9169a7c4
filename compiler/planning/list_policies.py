"""What there is to choose from: every policy with its source, what it needs, and its arguments.

Nothing is written twice: names, types and defaults come from the signature of a policy's `decide`, meanings and units from the
"Args" of its docstring, where `name (unit or range): meaning.` describes one argument.
"""

import inspect
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Union, get_args, get_origin

from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.compiler.policies import POLICIES

ENTRY = re.compile(r"    (?P<name>\w+)(?: \((?P<unit>[^)]*)\))?: (?P<meaning>.*)")


@dataclass(frozen=True)
class PolicyArgument:
    """One argument of a policy.

    Attributes:
        name: As `make_plan` and `-a` take it.
        type: Of its value, as in "float" or "list of str".
        required: Whether it must be given.
        default: Its value otherwise.
        unit: Unit or range; empty where the type says it all.
        meaning: What it does.
    """

    name: str
    type: str
    required: bool
    default: Any
    unit: str
    meaning: str


@dataclass(frozen=True)
class PolicyRecord:
    """One policy.

    Attributes:
        name: As `make_plan` and `--policy` take it.
        summary: What it does, in one sentence.
        source: The paper or repository it comes from.
        needs: "stats" where it needs calibration; "model" where it can run the model, with what that does under `services`.
            A policy that needs neither decides from the number of steps and the model's sites.
        unless: The argument that stands in for calibration, where there is one.
        stats: What it takes from calibration, in the policy's own words.
        services: What `make_plan` hands in where it has the model, and what for.
        arguments: Its own arguments.
    """

    name: str
    summary: str
    source: str
    needs: tuple[str, ...]
    unless: str | None
    stats: str
    services: Mapping[str, str]
    arguments: tuple[PolicyArgument, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.source}", *_wrapped(self.summary, 4), f"    needs {self._needed()}"]
        for argument in self.arguments:
            default = "required" if argument.required else f"default {_shown(argument.default)}"
            unit = f" ({argument.unit})" if argument.unit else ""
            lines += [f"    -a {argument.name}: {argument.type}{unit}; {default}", *_wrapped(argument.meaning, 8)]
        return "\n".join(lines)

    def _needed(self) -> str:
        """What it needs, in words."""
        instead = f", or -a {self.unless}" if self.unless else ""
        needed = [f"calibration (--stats{instead})"] if "stats" in self.needs else []
        if "model" in self.needs:
            needed.append(f"the model's weights, where it runs the model ({', '.join(self.services)})")
        return "; ".join(needed) or "nothing but the number of steps"


def policies() -> dict[str, PolicyRecord]:
    """Every policy by name (`stepgraph.policies`)."""
    return {name: describe_policy(name, policy) for name, policy in POLICIES.items()}


def describe_policy(name: str, policy: Policy) -> PolicyRecord:
    """The record of one policy, from its signature and docstring."""
    documented = documented_arguments(policy.decide)
    arguments, services = [], {}
    for parameter in inspect.signature(policy.decide).parameters.values():
        unit, meaning = documented.get(parameter.name, ("", ""))
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if _is_service(parameter.annotation):
            services[parameter.name] = meaning
            continue
        required = parameter.default is parameter.empty
        default = None if required else parameter.default
        arguments.append(PolicyArgument(parameter.name, type_name(parameter.annotation), required, default, unit, meaning))
    needs = ("stats",) * policy.needs_stats + ("model",) * bool(services)
    summary = (inspect.getdoc(policy.decide) or "").split("\n\n")[0].replace("\n", " ")
    stats = documented.get("stats", ("", ""))[1]
    return PolicyRecord(name, summary, policy.source, needs, policy.unless, stats, services, tuple(arguments))


def documented_arguments(function: Callable[..., Any]) -> dict[str, tuple[str, str]]:
    """Argument -> (unit, meaning), from the "Args" of a Google-style docstring; continued lines are joined."""
    _, _, section = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    documented: dict[str, tuple[str, str]] = {}
    name = ""
    for line in section.splitlines():
        entry = ENTRY.fullmatch(line)
        if entry:
            name = entry["name"]
            documented[name] = (entry["unit"] or "", entry["meaning"])
        elif line.startswith("        ") and name:
            unit, meaning = documented[name]
            documented[name] = (unit, f"{meaning} {line.strip()}")
        elif line.strip() and not line.startswith(" "):
            # The next section.
            break
    return documented


def type_name(annotation: Any) -> str:
    """A type in words, as the value is written on the command line (JSON)."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(member) for member in members if member is not type(None))
    if origin is Mapping or origin is dict:
        return f"{type_name(members[1])} by {'kind' if members[0] is str else type_name(members[0])}"
    if origin in (Sequence, list, tuple):
        return f"list of {type_name(members[0])}"
    return str(getattr(annotation, "__name__", annotation))


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, 92, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _is_service(annotation: Any) -> bool:
    """Whether a keyword takes a function: no caller gives it, `make_plan` does."""
    candidates = (annotation, *get_args(annotation))
    return any(candidate is Callable or get_origin(candidate) is Callable for candidate in candidates)


def _shown(default: Any) -> str:
    """A default as it would be written after `-a`."""
    if default is None:
        return "none"
    if isinstance(default, (tuple, list)):
        return f"[{', '.join(map(str, default))}]"
    return str(default).lower() if isinstance(default, bool) else str(default)
