"""Every shipped Triton config compiles for every target, with matrix instructions and without spills (no device needed)."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from helpers.once import once
from helpers.paths import ROOT
from stepgraph.triton_kernels import declines

HERE = Path(__file__).parent
# Whatever users run most is compiled in every run of the tests, the other targets where slow tests are.
USED = ("sm_90a", "gfx942")
# Targets of the same instructions and shared memory as others.
ALIKE = ("sm_86", "sm_89")
# Compiled in one process each.
GROUPS = (("sm_80", *ALIKE), ("sm_90a",), ("sm_100a", "sm_120a"), ("gfx942",))
EVERY_TARGET = pytest.mark.parametrize(
    "target",
    [pytest.param(target, marks=() if target in USED else pytest.mark.slow) for group in GROUPS for target in group],
)
PRODUCTS = {"project_kernel", "delta_kernel", "expand_kernel"}
NORMS = {"modulated_norm_kernel", "moments_kernel"}
KERNELS = PRODUCTS | NORMS | {"gated_residual_kernel", "linear_combination_kernel"}
pytestmark = pytest.mark.skipif(not declines._installed(), reason="triton is not installed")


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory) -> Callable[[str], list[dict]]:
    """What triton_ahead.py finds for a target, in a process without the interpreter and with a cache of its own.

    The workers of one run of the tests share what any of them has found.
    """

    @cache
    def compiled(group: tuple[str, ...]) -> list[dict]:
        folder = once(tmp_path_factory, f"ahead-{group[0]}", lambda folder: compile_ahead(group, folder))
        return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]

    def of_target(target: str) -> list[dict]:
        group = next(group for group in GROUPS if target in group)
        return [row for row in compiled(group) if row["target"] == target]

    return of_target


def compile_ahead(group: tuple[str, ...], folder: Path) -> None:
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "STEPGRAPH_"))}
    settings |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "triton_ahead.py"), "shipped", *group]
    result = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    (folder / "rows.jsonl").write_text(result.stdout, encoding="utf-8")


@EVERY_TARGET
def test_shipped_configs(rows_of, target):
    for dtype in ("bf16", "fp16", "fp32"):
        everything = dtype == "bf16" and target not in ALIKE
        used = {row["kernel"] for row in rows_of(target) if row["dtype"] == dtype}
        assert used >= (KERNELS if everything else {"project_kernel"} | NORMS)
        # In float32, rank 128 takes two kernels.
        assert ("delta_kernel" in used) == (dtype != "fp32")
        assert ("expand_kernel" in used) == (dtype != "fp16" or target in USED)
    assert [row for row in rows_of(target) if row["faults"]] == []


def kind(instruction: str) -> str:
    """A matrix instruction without the width of its tile, which does not change the order of a sum."""
    return re.sub(r"(m64)n\d+", r"\1", instruction)


@EVERY_TARGET
@pytest.mark.parametrize("amount_of_rows", ["", " of few rows"])
def test_p_is_added_up_as_what_is_subtracted_from_it(rows_of, target, amount_of_rows):
    """The same kind of instruction finds B x when it is stored and when it is corrected, whichever config is chosen."""
    # float16 has the code of bfloat16 with other products; few rows are compiled of it where it is used most.
    for dtype in ("bf16", "fp16") if target in USED or not amount_of_rows else ("bf16",):
        mine = [row for row in rows_of(target) if row["dtype"] == dtype and row["kernel"] in PRODUCTS]
        few = [row for row in mine if row["case"].endswith(" of few rows") == bool(amount_of_rows)]
        assert {row["case"] for row in few} >= {"input" + amount_of_rows}
        assert len({kind(instruction) for row in few for instruction in row["matrix"]}) == 1


@EVERY_TARGET
def test_moments_are_added_up_alike(rows_of, target):
    """Alone (for lowrank_delta) and within modulated_norm, rows are summed in the same layout: equal to the last bit."""
    for dtype in ("bf16", "fp16", "fp32"):
        mine = [row for row in rows_of(target) if row["dtype"] == dtype and row["kernel"] in NORMS]
        assert {row["kernel"] for row in mine} == NORMS
        # Contracted, the difference from the mean would be that from a mean that was not rounded, where that is not stored.
        assert {row["contracted"] for row in mine} <= {0, None}
        layouts = [row["reduced"] for row in mine]
        assert len(layouts[0]) == 2
        assert all(layout == layouts[0] for layout in layouts)
