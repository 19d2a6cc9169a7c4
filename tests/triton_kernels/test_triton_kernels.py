"""The Triton providers: their kernels in the interpreter (a process of its own), and which arguments they take."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from helpers.children import environment
from helpers.devices import KB, SHEETS, machine_of
from helpers.paths import ROOT
from stepgraph.errors import OpError
from stepgraph.ops import OPS
from stepgraph.triton_kernels import DECLINES, declines

HERE = Path(__file__).parent
KERNELS = pytest.mark.skipif(not declines._installed(), reason="triton is not installed")
# How many interpreted tests there are; fewer would mean that some were lost on the way.
INTERPRETED = 193


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    left = ("STEPGRAPH_", "TRITON_", "PYTEST_")
    around = {name: value for name, value in environment().items() if not name.startswith(left)} | variables
    return subprocess.run([sys.executable, *command], env=around, cwd=ROOT, capture_output=True, text=True, check=False)


@KERNELS
@pytest.mark.slow
def test_kernels_in_the_interpreter(tmp_path):
    report = tmp_path / "interpreted.xml"
    options = ("-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}")
    result = run("-m", "pytest", str(HERE / "triton_interpreted.py"), *options, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": INTERPRETED, "failures": 0, "errors": 0, "skipped": 0,
    }  # fmt: skip


def test_every_operation_has_kernels():
    assert set(DECLINES) == set(OPS)
    assert all("triton" in op.providers for op in OPS.values())


x, row = torch.randn(2, 5, 8), torch.randn(2, 8)
meta = {"device": "meta"}


@KERNELS
def test_a_forced_provider_that_cannot_raises(monkeypatch):
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "triton")
    with pytest.raises(OpError, match=r"triton declines .*on the CPU.*TRITON_INTERPRET=1"):
        OPS["modulated_norm"](x, row, row)
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "triton,reference")
    torch.testing.assert_close(OPS["modulated_norm"](x, row, row), OPS["modulated_norm"].reference(x, row, row))


def test_without_settings_the_cpu_does_not_ask_triton():
    assert OPS["modulated_norm"].choose(x, row, row).name != "triton"


factors = ([torch.randn(6, 3)], torch.randn(3, 8))
stored, p = [torch.randn(2, 5, 6)], torch.randn(2, 5, 3)
DECLINED = [
    ("modulated_norm", (x.double(), row.double(), row.double()), "no kernel for torch.float64"),
    ("modulated_norm", (x, row.half(), row), "dtypes torch.float16, torch.float32"),
    ("modulated_norm", (x, torch.randn(3, 8), row), "does not broadcast"),
    ("modulated_norm", (torch.randn(1, 1, 20000), torch.randn(1, 20000), torch.randn(1, 20000)), "20000 channels"),
    ("modulated_norm", (torch.randn(2, 2, 2, 8), row, row), "4 dimensions"),
    ("lowrank_input", (x, torch.randn(3, 7)), "does not fit"),
    ("lowrank_input", (x, torch.randn(3, 9)[:, :8]), "b has strides (9, 1); expected to be contiguous"),
    ("lowrank_delta", (x, stored, p.half(), *factors), "p is torch.float16"),
    ("lowrank_delta", (x, stored, p, [torch.randn(6, 2)], factors[1]), "add up to b's 3"),
    ("lowrank_delta", (x, [torch.randn(2, 5, 7)], p, *factors), "a stored output is [2, 5, 7]; expected [2, 5, 6]"),
    ("lowrank_delta", (x, stored, p, *factors, row), "only one of"),
    ("lowrank_delta", (x, stored * 9, p, *factors), "9 stored outputs"),
    (
        "lowrank_delta",
        (x, stored, p, *factors, None, None, 1e-6, torch.randn(2, 6), x),
        "residual is [2, 5, 8]; expected [2, 5, 6]",
    ),
    ("gated_residual", (x, [row], [x[:1]]), "a value is [1, 5, 8]; expected [2, 5, 8]"),
    ("gated_residual", (x, [], []), "0 gates"),
    ("linear_combination", ([x] * 9, torch.randn(9)), "9 values"),
    ("linear_combination", ([x, x], torch.randn(4)), "coefficients [4] for 2 values"),
    ("linear_combination", ([x, x], torch.randn(2).double()), "expected torch.float32"),
    ("linear_combination", ([x, x[:1]], torch.randn(2)), "a value is [1, 5, 8]; expected [2, 5, 8]"),
]


@pytest.mark.parametrize(("name", "args", "reason"), DECLINED)
def test_declines(monkeypatch, name, args, reason):
    # As if on a device: only the arguments count.
    monkeypatch.setattr(declines, "_device", lambda x: "")
    assert reason in OPS[name].providers["triton"].declines(*args)


@KERNELS
def test_declines_by_device(monkeypatch):
    ask = OPS["modulated_norm"].providers["triton"].declines
    assert "'meta'" in ask(x.to("meta"), row.to("meta"), row.to("meta"))
    assert "tensors on cpu, meta" in ask(x, row.to("meta"), row)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ask(x, row, row) == ""


@KERNELS
@pytest.mark.parametrize(
    ("capability", "hip", "reason"), [((7, 5), None, "7.5 is below 8.0"), ((8, 0), None, ""), ((9, 4), "6", "")]
)
def test_declines_old_devices(monkeypatch, capability, hip, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(declines, "_capability", lambda device: capability)
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake, table = torch.empty(2, 5, 8, device="cuda:0"), torch.empty(2, 8, device="cuda:0")
        found = DECLINES["modulated_norm"](fake, table, table)
    assert reason in found
    assert bool(found) == bool(reason)


@KERNELS
@pytest.mark.parametrize("card", SHEETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_every_card_products_are_added_up_alike(card, dtype):
    """Whichever configs are tried: rows and depth of a tile of B x are those of p, or an unchanged input would not cancel."""
    from stepgraph.triton_kernels.lowrank_tiles import project_configs, row_block, single_configs, takes_single

    limits = machine_of(card)
    assert (limits.processors, limits.shared // KB) == {"A100": (108, 163)}.get(card, (132, 227))
    for rows in (1, 512, 4096, 4608, 16384):
        for ranks in ((20,), (64,), (128, 128, 64), (256,)):
            tables = [project_configs(rows, sum(ranks), dtype, limits)]
            if takes_single(rows, ranks, dtype, limits):
                tables.append(single_configs(rows, ranks, dtype, limits))
            blocks = {(config.block["BLOCK_M"], config.block["BLOCK_K"]) for table in tables for config in table}
            assert blocks == {row_block(rows, dtype, limits)}


def test_registering_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
import stepgraph.triton_kernels
from stepgraph.ops import OPS
x, row = torch.randn(2, 5, 8), torch.randn(2, 8)
assert OPS["modulated_norm"].providers["triton"].declines(x, row, row) == "triton is not installed"
assert not any(name.startswith("triton.") for name in sys.modules)
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


def test_registering_imports_no_kernel():
    code = """
import sys
import stepgraph.triton_kernels
assert "stepgraph.triton_kernels.declines" in sys.modules
assert not [name for name in sys.modules if name.startswith("stepgraph.triton_kernels.") and name.endswith(("launch", "delta"))]
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
