"""What keeping stored values in a narrower dtype costs on glyph-dit.

    python -m stepgraph.bench.quality.slot_dtypes --out bench/results

Images of a plan whose values are stored in each dtype against full compute from the same noise, and against the same plan with
values as they are: `versus_wide` is the relative L2 between the two, what the dtype alone costs.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from stepgraph.bench.quality.paired import Host
from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_rows
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.forecast.correct_plan import forecast
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import SLOT_DTYPES, CompileConfig
from stepgraph.metrics import relative_errors
from stepgraph.plan import CachePlan


def plans(host: Host) -> dict[str, CachePlan]:
    """Plans that store values of modules, of the last block, and several for each forecast."""

    def interval(*kinds: str) -> CachePlan:
        common = {"model": host.model, "scheduler": host.scheduler, "steps": host.steps, "every": 2}
        return make_plan("interval", kinds=list(kinds) or None, **common)

    return {"modules": interval(), "modules, taylor 1": forecast(interval(), "taylor", 1), "hidden": interval("hidden")}


def measure(host: Host) -> list[dict[str, Any]]:
    """A row per plan and dtype."""
    rows = []
    inputs = example_inputs(host.model, 2 * host.per_seed)
    for name, plan in plans(host).items():
        wide: torch.Tensor | None = None
        for dtype in (None, *SLOT_DTYPES):
            exe = compile_plan(host.model, plan, inputs, CompileConfig("eager", slot_dtype=dtype))
            images = host.images(exe)
            wide = images if wide is None else wide
            facts: dict[str, Any] = {"plan": name, "slot_dtype": dtype or "float32"}
            facts["peak_slot_bytes"] = exe.memory().peak_slot_bytes // exe.default.batch
            facts["versus_wide"] = float(relative_errors(images, wide).mean())
            rows.append({**facts, **host.compare(images)})
    return rows


def main() -> None:
    """Measure, print and write `slot-dtypes.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=64, help="images, in four groups of one seed each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    host = Host("ddim", arguments.steps, 1.5, (0, 1, 2, 3), arguments.samples // 4, arguments.device)
    rows = measure(host)
    columns = ("plan", "slot_dtype", "peak_slot_bytes", "versus_wide", "relative_l2")
    show_rows(f"glyph-dit, {arguments.steps} steps, N = {arguments.samples}", rows, columns)
    facts = {"model": "glyph-dit", "scheduler": "ddim", "steps": arguments.steps, "samples": arguments.samples}
    write_record(arguments.out / "slot-dtypes.json", arguments.device, facts | {"rows": rows})


if __name__ == "__main__":
    main()
