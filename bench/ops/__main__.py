"""Fused operations against plain torch, torch.compile, the full linear maps and the machine's ceilings.

    python -m stepgraph.bench.ops --shapes dit-xl-2-256 --out out/bench

Every contender's result is checked against float64 before it is timed; contenders take turns within one process, and what is
reported are ratios of their medians. A provider that is slower than the reference anywhere is a defect: the run then ends with
status 1, after writing its record.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from stepgraph.bench.ops.shapes import SHAPES
from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_rows

# A median of short calls on a shared machine is good to about this.
NOISE = 0.9


def main() -> int:
    """Measure and write `ops-<device>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="*", default=[shape.name for shape in SHAPES])
    parser.add_argument("--dtypes", nargs="*", help="float32, bfloat16, float16; the first two on a CPU unless given")
    parser.add_argument("--op", default="", help="one operation alone")
    parser.add_argument("--seconds", type=float, default=0.5, help="per case")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    arguments.dtypes = arguments.dtypes or ["float32", "bfloat16", *([] if on_cpu else ["float16"])]
    chosen = [f"({shape} and {dtype})" for shape in arguments.shapes for dtype in arguments.dtypes]
    with TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        status = pytest.main(
            [
                str(Path(__file__).parent / "bench_ops.py"), "-q", "-p", "no:cacheprovider", "-c", "/dev/null",
                "--rootdir", str(Path(__file__).parent), "--benchmark-disable-gc", "--benchmark-columns", "median",
                "-k", " or ".join(chosen), f"--benchmark-json={raw}", "--device", arguments.device,
                "--seconds", str(arguments.seconds), "--only-op", arguments.op,
            ]
        )  # fmt: skip
        if status:
            return int(status)
        runs = [bench["extra_info"] for bench in json.loads(raw.read_text(encoding="utf-8"))["benchmarks"]]
    cases = [{"dtype": run["dtype"], **case} for run in runs for case in run["cases"]]
    ceilings = {run["dtype"]: run["ceilings"] for run in runs}
    show(cases)
    write_record(
        arguments.out / f"ops-{arguments.device.split(':')[0]}.json", arguments.device, {"ceilings": ceilings, "cases": cases}
    )
    slow = [case for case in cases if case["versus_reference"] < NOISE]
    for case in slow:
        print(f"slower than the reference: {case['op']} {case['case']} {case['dtype']} by {case['chosen']}", file=sys.stderr)
    return int(bool(slow))


def show(cases: list[dict[str, Any]]) -> None:
    """A table on the terminal."""
    columns = ("op", "case", "dtype", "chosen", "us", "versus_torch", "versus_compile", "versus_full", "share_of_floor")
    rows = [{**case, "us": round(case["microseconds"][case["chosen"]])} for case in cases]
    show_rows("operations", rows, columns, ".2f")


if __name__ == "__main__":
    sys.exit(main())
