"""What a GPU has to show, in one call of at most six minutes; `bench/gpu_suite.sh prove` sets it up.

    python -m stepgraph.bench.prove OUT [--only PART,...] [--plans FOLDER] [--seconds S] [--tiny]

Each part is a process of its own with a limit of seconds, and writes each row as it is measured; what one leaves of its time
the next ones have. While the tests run, the parts behind them fill the compilers' caches, so that what is timed is a second
process. OUT/rows.jsonl has all rows, OUT/prove.json the record, and standard output the table of what was measured against its
bar.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from stepgraph.bench.bars import against_bars
from stepgraph.bench.record import CHECKOUT, provenance
from stepgraph.bench.rows import Rows
from stepgraph.bench.tables import show_rows

MODELS, KERNELS = "stepgraph.bench.speed.prove_models", "stepgraph.bench.ops.in_graphs"
# What attention backends and peers need; a machine that lacks one has no row of it.
OPTIONAL = {
    "flash_attn_3": "flash_attn_interface",
    "flash_attn": "flash_attn",
    "sage": "sageattention",
    "cache-dit": "cache_dit",
}
# Seconds below which no part is begun, and bytes above which a file could not be carried off.
LEAST, MOST_BYTES = 5.0, 16 * 2**20
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


@dataclass(frozen=True)
class ProvePart:
    """A part: its name, seconds that it may take, and whether it can be built while the tests run."""

    name: str
    limit: float
    built: bool = True


# In order of worth.
PARTS = (
    ProvePart("tests", 110, built=False), ProvePart("dit1", 70), ProvePart("flux", 75), ProvePart("dit16", 25),
    ProvePart("kernels", 25, built=False), ProvePart("whole", 25),
)  # fmt: skip


def command_of(part: str, options: argparse.Namespace) -> list[str]:
    """The command of a part."""
    device = "cpu" if options.tiny else "cuda"
    common = ["--device", device, *(["--tiny"] if options.tiny else [])]
    if part == "tests":
        chosen = ["--noconftest", "tests/gpu/test_gpu_ops.py"] if options.tiny else ["-n", "5"]
        return [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", *chosen]
    if part == "kernels":
        return [sys.executable, "-m", KERNELS, str(options.out / "rows.jsonl"), *common]
    plans = [] if options.plans is None else ["--plans", str(options.plans)]
    return [sys.executable, "-m", MODELS, part, str(options.out / "rows.jsonl"), *common, *plans]


@contextlib.contextmanager
def building(parts: list[ProvePart], options: argparse.Namespace) -> Iterator[None]:
    """Processes that build what these parts measure, without measuring it; they are ended at the end."""
    started = [
        _start(["nice", "-n", "10", *command_of(part.name, options), "--build-only"], sys.stderr)
        for part in parts
        if part.built
    ]
    try:
        yield
    finally:
        for process in started:
            _end(process)


def _start(command: list[str], target: Any) -> subprocess.Popen[bytes]:
    """A process with a session of its own, so that it can be ended with those that it starts."""
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=target, stderr=sys.stderr, start_new_session=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    # The process itself may be gone, and its children not.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(part: ProvePart, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run a part for so many seconds at most; how it ended."""
    begun = time.monotonic()
    with (options.out / "tests.txt").open("w") if part.name == "tests" else contextlib.nullcontext(sys.stderr) as target:
        process = _start(command_of(part.name, options), target)
        try:
            code = process.wait(seconds)
            status = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.1f} s"
        finally:
            _end(process)
    return {"part": part.name, "status": status, "seconds": round(time.monotonic() - begun, 1)}


def outcomes(text: str) -> dict[str, Any]:
    """How many tests passed, failed and were skipped so far, by pytest's line for each, and which failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for line in text.partition("short test summary info")[0].splitlines():
        outcome = OUTCOME.search(line)
        if outcome is None or "::" not in line or line.startswith(("E ", "    ")):
            continue
        kind = {"FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}.get(outcome[1], "passed")
        counts[kind] += 1
        if kind == "failed":
            failures.append(next((word for word in line.split() if "::" in word), line))
    return {**counts, "failures": failures[:100]}


def record(options: argparse.Namespace, ended: list[dict[str, Any]], rows: Rows) -> list[dict[str, Any]]:
    """Write prove.json; the rows of the table."""
    figures = rows.read()
    table = list(against_bars(figures, rehearsed=options.tiny))
    facts = {
        **provenance("cpu" if options.tiny else "cuda"), "driver": _driver(), "tiny": options.tiny,
        "versions": {name: _version(name) for name in ("torch", "triton", "diffusers", "stepgraph")},
        "absent": [name for name, module in OPTIONAL.items() if find_spec(module) is None],
        "plans": sorted(path.name for path in options.plans.glob("*.json")) if options.plans is not None else [],
        "parts": ended, "table": table, "rows": figures,
    }  # fmt: skip
    partial = options.out / "prove.json.partial"
    partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    partial.replace(options.out / "prove.json")
    return table


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0] or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main(given: list[str] | None = None) -> int:
    """Run the parts and print the table; 1 where a part did not end well."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=lambda text: Path(text).resolve())
    parser.add_argument("--only", type=lambda text: text.split(","), default=names, help=f"some of {', '.join(names)}")
    parser.add_argument("--plans", type=lambda text: Path(text).resolve(), help="folder of published plans")
    parser.add_argument("--seconds", type=float, default=330, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU with tiny models")
    options = parser.parse_args(given)
    unknown = [name for name in options.only if name not in names]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; known: {', '.join(names)}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --tiny rehearses on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    rows, deadline = Rows(options.out / "rows.jsonl"), time.monotonic() + options.seconds
    chosen = [part for part in PARTS if part.name in options.only]
    ended: list[dict[str, Any]] = []
    for place, part in enumerate(chosen):
        later, left = sum(other.limit for other in chosen[place + 1 :]), deadline - time.monotonic()
        seconds = min(left, max(part.limit, left - later))
        if seconds < LEAST:
            ended.append({"part": part.name, "status": "no time was left", "seconds": 0})
            continue
        if part.name == "tests":
            rows.begin("tests", "cpu" if options.tiny else "cuda")
            behind = chosen[place + 1 :]
            with building([] if options.tiny else behind, options):
                ended.append(run_part(part, seconds, options))
            rows.add("tests", "tests", **outcomes((options.out / "tests.txt").read_text(encoding="utf-8", errors="replace")))
        else:
            ended.append(run_part(part, seconds, options))
        table = record(options, ended, rows)
    table = record(options, ended, rows)
    for path in (options.out / "rows.jsonl", options.out / "tests.txt"):
        _shorten(path)
    show_rows("parts", ended, ("part", "status", "seconds"))
    show_rows("measured against bar", table, ("part", "what", "measured", "bar", "aim", "verdict"), ".3g")
    return int(any(part["status"] != "ok" for part in ended))


def _shorten(path: Path) -> None:
    """Leave the end of a file that is too long to be carried off."""
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        path.write_bytes(path.read_bytes()[-MOST_BYTES // 2 :])


if __name__ == "__main__":
    sys.exit(main())
