"""A plan of every action, and exported runners run in a fresh process."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import stepgraph as sg
from stepgraph.plan import CachePlan

# A process in which stepgraph cannot be imported, nor anything else that torch does not bring.
FRESH = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.modules.update(dict.fromkeys(["stepgraph", "diffusers", "safetensors", "transformers"]))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def mixed_plan(model, scheduler, steps: int, rank: int) -> tuple[CachePlan, sg.Factors]:
    """Every second step: ff LOWRANK, the first attention FORECAST and the others REUSE."""
    plan = sg.make_plan("interval", model=model, scheduler=scheduler, steps=steps, every=2, kinds=["attn", "ff"])
    plan = sg.lowrank(plan, kinds=["ff"])
    plan = sg.forecast(plan, sites=[next(site.name for site in plan.sites if site.kind == "attn")])
    factors = sg.factorize(model, method="svd", rank=rank)
    assert {letter for row in plan.rows for letter in row} == set("CRLF")
    return replace(plan, header=replace(plan.header, factors=factors.digest)), factors


def run_fresh(folder: Path, given: dict[str, torch.Tensor], tmp_path: Path, guidance: float) -> torch.Tensor:
    """Latents of the export's own run.py in a process of its own."""
    save_file(given, tmp_path / "given.safetensors")
    site = Path(torch.__file__).parents[1]
    command = [
        "-I",
        "-S",
        "-c",
        FRESH,
        site,
        folder / "run.py",
        tmp_path / "given.safetensors",
        tmp_path / "latents.safetensors",
    ]
    result = subprocess.run(
        [sys.executable, *map(str, command), "--guidance", str(guidance)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    return load_file(tmp_path / "latents.safetensors")["latents"]


def error_of(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((given - wanted).norm() / wanted.norm())
