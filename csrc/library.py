"""The native library: found and loaded on first use, and what it can run on this CPU.

The library is optional: without a compiler the package installs without it, and all providers decline with the reason.
"""

import ctypes
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from stepgraph.errors import ArgumentError, OpError
from stepgraph.ops import forget_choices

FOLDER = Path(__file__).parent
# In the order of `Level` in native.h. The last computes in plain C++ what AMX tiles would, for tests on any CPU.
LEVELS = ("none", "baseline", "avx2", "avx512", "avx512_bf16", "amx", "emulated_tiles")
REINSTALL = (
    "with a C++ compiler at hand, install stepgraph again (pip install --force-reinstall --no-deps, or -e in a checkout)"
)


@dataclass(frozen=True)
class Native:
    """The library.

    Attributes:
        library: Its functions; None where it is missing or has no kernels for this CPU.
        level: The highest of `LEVELS` that this CPU runs.
        missing: Why there is no library; empty where there is one.
        advice: What would help against it.
    """

    library: ctypes.CDLL | None
    level: str
    missing: str = ""
    advice: str = ""


def sources_digest(folder: Path = FOLDER) -> str:
    """Of the C++ sources in a folder, as setup.py writes it into the library."""
    files = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def load(folder: Path) -> Native:
    """The library in a folder; it never raises."""
    files = sorted(folder.glob("_native*.so"))
    if not files:
        return Native(None, "none", "the native library was not built", REINSTALL)
    try:
        library = ctypes.CDLL(str(files[0]))
        built_from = _function(library, "stepgraph_sources", ctypes.c_char_p)().decode()
        level = LEVELS[_function(library, "stepgraph_level", ctypes.c_int64)()]
    except (OSError, AttributeError) as error:
        return Native(None, "none", f"the native library cannot be loaded ({error})", REINSTALL)
    if built_from != sources_digest(folder):
        return Native(None, "none", "the native library was built from other sources than these", REINSTALL)
    if level == "none":
        return Native(None, level, "the native library has no kernels for this kind of processor")
    word, words = ctypes.c_int64, ctypes.c_void_p
    for name in ("modulated_norm", "lowrank"):
        _function(library, f"stepgraph_{name}", None, words, ctypes.c_double)
    for name in ("gated_residual", "linear_combination"):
        _function(library, f"stepgraph_{name}", None, words)
    _function(library, "stepgraph_packed_bytes", word, word, word, word)
    _function(library, "stepgraph_pack", None, word, words, word, word, word, word, words)
    return Native(library, level)


def _function(library: ctypes.CDLL, name: str, result: type | None, *arguments: type) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


@lru_cache(maxsize=1)
def native() -> Native:
    """The library of this installation."""
    return load(FOLDER)


def kernels() -> ctypes.CDLL:
    """The library's functions, for providers, which decline where there are none.

    Raises:
        OpError: There is no library, or none for this CPU.
    """
    if (library := native().library) is None:
        raise OpError(native().missing)
    return library


def levels() -> tuple[str, ...]:
    """What `at_level` takes on this CPU."""
    highest = LEVELS.index(native().level)
    # All but the tiles themselves runs as it does beside real ones, with AVX-512.
    return LEVELS[1 : highest + 1] + (LEVELS[-1:] if highest >= LEVELS.index("avx512") else ())


_limits: list[str] = []


def level() -> str:
    """The level that kernels run at."""
    return _limits[-1] if _limits else native().level


@contextmanager
def at_level(name: str) -> Iterator[None]:
    """Run kernels at a lower level than the CPU's, or at "emulated_tiles", for the tests.

    Raises:
        ArgumentError: There is no such level, or this CPU is below it.
    """
    if name not in levels():
        raise ArgumentError(f"level {name!r} cannot run here; levels: {', '.join(levels())}")
    _limits.append(name)
    forget_choices()
    try:
        yield
    finally:
        _limits.pop()
        forget_choices()
