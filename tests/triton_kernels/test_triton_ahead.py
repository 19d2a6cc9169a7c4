"""Every shipped Triton config compiles for every target, with matrix instructions and without spills (no device needed)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from stepgraph.triton_kernels import declines

HERE = Path(__file__).parent
# Of these every config is compiled.
USED = ("sm_90a", "gfx942")
# Targets of the same instructions and shared memory as others, for which the most used launches in bfloat16 are enough.
ALIKE = ("sm_86", "sm_89")
# Compiled in one process each.
GROUPS = (
    *(pytest.param((target,), id=target) for target in USED),
    pytest.param(("sm_80", *ALIKE), id="sm_80"),
    pytest.param(("sm_100a", "sm_120a"), id="sm_100a"),
)
PRODUCTS = {"project_kernel", "delta_kernel", "expand_kernel"}
NORMS = {"modulated_norm_kernel", "moments_kernel"}
KERNELS = PRODUCTS | NORMS | {"gated_residual_kernel", "linear_combination_kernel"}
pytestmark = pytest.mark.skipif(not declines._installed(), reason="triton is not installed")


def compile_ahead(targets: tuple[str, ...], cache: Path) -> list[dict]:
    """What triton_ahead.py finds for targets, in a process without the interpreter."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "STEPGRAPH_"))}
    settings |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "triton_ahead.py"), "shipped", *targets]
    result = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("targets", GROUPS)
def test_shipped_configs(targets, tmp_path):
    rows = compile_ahead(targets, tmp_path)
    assert {row["target"] for row in rows} == set(targets)
    for target in targets:
        compiled = [row for row in rows if row["target"] == target]
        assert [row for row in compiled if row["faults"]] == []
        check_that_all_is_there(target, compiled)
        check_p(target, compiled)
        check_moments(target, compiled)


def dtypes_of(target: str) -> tuple[str, ...]:
    return ("bf16",) if target in ALIKE else ("bf16", "fp16", "fp32")


def check_that_all_is_there(target: str, rows: list[dict]) -> None:
    for dtype in dtypes_of(target):
        everything = dtype == "bf16" and target not in ALIKE
        used = {row["kernel"] for row in rows if row["dtype"] == dtype}
        assert used >= (KERNELS if everything else {"project_kernel"} | NORMS), (target, dtype)
        # In float32, rank 128 takes two kernels.
        assert ("delta_kernel" in used) == (dtype != "fp32"), (target, dtype)
        assert ("expand_kernel" in used) == (dtype != "fp16" or target in USED), (target, dtype)


def kind(instruction: str) -> str:
    """A matrix instruction without the width of its tile, which does not change the order of a sum."""
    return re.sub(r"(m64)n\d+", r"\1", instruction)


def check_p(target: str, rows: list[dict]) -> None:
    """The same kind of instruction finds B x when it is stored and when it is corrected, whichever config is chosen."""
    for amount_of_rows in ("", " of few rows"):
        # float16 has the code of bfloat16 with other products; few rows are compiled of it where it is used most.
        every = target in USED or (not amount_of_rows and target not in ALIKE)
        for dtype in ("bf16", "fp16") if every else ("bf16",):
            mine = [row for row in rows if row["dtype"] == dtype and row["kernel"] in PRODUCTS]
            few = [row for row in mine if row["case"].endswith(" of few rows") == bool(amount_of_rows)]
            assert {row["case"] for row in few} >= {"input" + amount_of_rows}, (target, dtype)
            assert len({kind(instruction) for row in few for instruction in row["matrix"]}) == 1, (
                target,
                dtype,
                amount_of_rows,
            )


def check_moments(target: str, rows: list[dict]) -> None:
    """Alone (for lowrank_delta) and within modulated_norm, rows are summed in the same layout: equal to the last bit."""
    for dtype in dtypes_of(target):
        mine = [row for row in rows if row["dtype"] == dtype and row["kernel"] in NORMS]
        assert {row["kernel"] for row in mine} == NORMS, (target, dtype)
        # Contracted, the difference from the mean would be that from a mean that was not rounded, where that is not stored.
        assert {row["contracted"] for row in mine} <= {0, None}, (target, dtype)
        layouts = [row["reduced"] for row in mine]
        assert len(layouts[0]) == 2
        assert all(layout == layouts[0] for layout in layouts), (target, dtype)
