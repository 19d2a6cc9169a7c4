"""Every STEPGRAPH_* environment variable, read at the moment it is asked for."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from stepgraph.checked import checked
from stepgraph.errors import ArgumentError

VARIABLES = {
    "STEPGRAPH_DUMP": "folder for numbered graph dumps before and after each pass and row",
    "STEPGRAPH_DISABLE_PASS": "comma-separated names of optional passes to leave out",
    "STEPGRAPH_LOG": "level of the messages on standard error: debug, info, warning",
    "STEPGRAPH_CACHE": "folder for statistics, plans and compiled regions that are kept; ~/.cache/stepgraph unless given",
    "STEPGRAPH_REGIONS": "most megabytes of compiled regions that are kept there; 512 unless given, 0 for none",
    "STEPGRAPH_PROVIDERS": "comma-separated providers of fused operations, first choice first: triton, cpu, reference",
    "STEPGRAPH_CHECK": "1: re-check graphs after each pass on real data, look for NaN, and read all weights at every run",
}
PROVIDERS = ("triton", "cpu", "reference")


@dataclass(frozen=True)
class Env:
    """The environment's settings."""

    dump: Path | None
    disabled_passes: frozenset[str]
    log: str
    check: bool
    cache: Path
    regions_mb: float
    providers: tuple[str, ...]


def read_env() -> Env:
    """The current settings.

    Raises:
        ArgumentError: A variable starts with STEPGRAPH_ but is not known, or has a value it cannot have.
    """
    variables = {name: value for name, value in os.environ.items() if name.startswith("STEPGRAPH_")}
    unknown = sorted(set(variables) - set(VARIABLES))
    if unknown:
        raise ArgumentError(f"unknown environment variable {unknown[0]}; known: {', '.join(VARIABLES)}")
    check = variables.get("STEPGRAPH_CHECK", "0")
    if check not in ("0", "1", ""):
        raise ArgumentError(f"STEPGRAPH_CHECK is {check!r}; expected 0 or 1")
    level = variables.get("STEPGRAPH_LOG", "warning").lower()
    if level not in ("debug", "info", "warning", "error"):
        raise ArgumentError(f"STEPGRAPH_LOG is {level!r}; expected debug, info, warning or error")
    dump = variables.get("STEPGRAPH_DUMP")
    disabled = frozenset(name.strip() for name in variables.get("STEPGRAPH_DISABLE_PASS", "").split(",") if name.strip())
    cache = Path(variables.get("STEPGRAPH_CACHE") or Path.home() / ".cache" / "stepgraph")
    try:
        regions_mb = float(variables.get("STEPGRAPH_REGIONS") or 512)
    except ValueError:
        regions_mb = -1.0
    if not 0 <= regions_mb < float("inf"):
        raise ArgumentError(f"STEPGRAPH_REGIONS is {variables['STEPGRAPH_REGIONS']!r}; expected megabytes, 0 or more")
    providers = tuple(name.strip() for name in variables.get("STEPGRAPH_PROVIDERS", "").split(",") if name.strip())
    unknown = sorted(set(providers) - set(PROVIDERS))
    if unknown:
        raise ArgumentError(f"STEPGRAPH_PROVIDERS names {unknown[0]!r}; the providers are {', '.join(PROVIDERS)}")
    return Env(Path(dump) if dump else None, disabled, level, check == "1", cache, regions_mb, providers)


@checked
def get_logger(name: str) -> logging.Logger:
    """The logger of a part of stepgraph, at the level of STEPGRAPH_LOG."""
    logger = logging.getLogger(f"stepgraph.{name}")
    root = logging.getLogger("stepgraph")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        root.addHandler(handler)
    level = logging.getLevelName(read_env().log.upper())
    # Setting it makes every logger of the process forget what it knows of levels.
    if root.level != level:
        root.setLevel(level)
    return logger
