"""`stepgraph doctor`: what this machine has, what stepgraph would use of it, and what is missing."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stepgraph.assets.glyphs import ASSETS
from stepgraph.cli.options import Json, reports_errors
from stepgraph.env import VARIABLES
from stepgraph.errors import OpError
from stepgraph.ops import OPS, load_providers

NEEDED = ("torch", "diffusers", "safetensors", "numpy", "typer", "rich", "matplotlib", "pillow")
PACKAGES = ("stepgraph", *NEEDED, "triton", "transformers", "accelerate")


def examine() -> dict[str, Any]:
    """Sections of name -> finding, and a list of advice."""
    advice: list[str] = []
    versions = {name: _version(name) for name in PACKAGES}
    advice += [f"{name} is not installed: pip install {name}" for name in NEEDED if versions[name] == "not installed"]
    if torch.cuda.is_available() and versions["triton"] == "not installed":
        advice.append("there is a CUDA device, but triton is not installed: backend='inductor' cannot compile for it")
    return {
        "versions": {"python": platform.python_version(), **versions},
        "devices": _devices(advice),
        "compilers": _compilers(advice),
        "fused ops": _fused_ops(advice),
        "caches": _caches(),
        "environment": {name: os.environ.get(name, f"not set ({meaning})") for name, meaning in VARIABLES.items()},
        "assets": _assets(advice),
        "advice": advice,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices(advice: list[str]) -> dict[str, str]:
    facts = {
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            facts[f"cuda:{i}"] = (
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
            )
    else:
        built = torch.version.cuda or torch.version.hip
        facts["cuda"] = "no device" if built else "this build of torch has no CUDA"
        if shutil.which("nvidia-smi") and not built:
            advice.append("there is an NVIDIA driver, but torch was built without CUDA: install a CUDA build of torch")
    return facts


def _compilers(advice: list[str]) -> dict[str, str]:
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name) or shutil.which("clang++")
    if path is None:
        advice.append("no C++ compiler: backend='inductor' cannot compile for the CPU; install g++ or use backend='eager'")
        return {"c++": "not found"}
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return {"c++": shown[0] if shown else path}


def _fused_ops(advice: list[str]) -> dict[str, str]:
    """What provider packages say of themselves, and for each operation who would run it, by device and dtype."""
    facts: dict[str, str] = {}
    for package in load_providers():
        if hasattr(package, "describe"):
            shown, missing = package.describe()
            facts |= shown
            advice += missing
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for name in OPS:
        kinds = [(device, dtype) for device in devices for dtype in (torch.float32, torch.bfloat16)]
        facts[name] = "; ".join(
            f"{device} {str(dtype).split('.')[1]}: {_chosen(name, device, dtype)}" for device, dtype in kinds
        )
    return facts


def _chosen(name: str, device: str, dtype: torch.dtype) -> str:
    """The provider of an operation for one image of DiT-XL/2 at 512 x 512 and factors of rank 128; or why there is none."""
    tokens = torch.empty(1, 1024, 1152, device=device, dtype=dtype)
    modulation, factor = tokens[:, 0], torch.empty(128, 1152, device=device, dtype=dtype)
    projected = torch.empty(1, 1024, 128, device=device)
    ends = (modulation, modulation, 1e-6, modulation, tokens)
    arguments: dict[str, tuple[Any, ...]] = {
        "lowrank_input": (tokens, factor),
        "lowrank_delta": (tokens, [tokens], projected, [factor.t()], factor, *ends),
        "modulated_norm": (tokens, modulation, modulation),
        "gated_residual": (tokens, [modulation, modulation], [tokens, tokens]),
        "linear_combination": ([tokens, tokens], torch.empty(2, device=device)),
    }
    try:
        return OPS[name].choose(*arguments[name]).name
    except OpError as error:
        return str(error)


def _caches() -> dict[str, str]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    inductor = Path(cache_dir())
    triton = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return {"inductor": _size(inductor), "triton": _size(triton)}


def _size(path: Path) -> str:
    if not path.is_dir():
        return f"{path} (empty)"
    total = 0
    for entry in path.rglob("*"):
        # Another process may be cleaning the cache up.
        try:
            total += entry.stat().st_size if entry.is_file() else 0
        except OSError:
            continue
    return f"{path} ({total / 1e6:.1f} MB)"


def _assets(advice: list[str]) -> dict[str, str]:
    sizes = {}
    files = {"glyph-dit": "glyph-dit/diffusion_pytorch_model.safetensors", "glyph-classifier": "glyph-classifier.safetensors"}
    for name, file in files.items():
        path = ASSETS / file
        sizes[name] = f"{path.stat().st_size / 1e6:.2f} MB" if path.is_file() else "missing"
        if not path.is_file():
            advice.append(f"{path} is missing: reinstall stepgraph")
    return sizes


@reports_errors
def doctor_command(as_json: Json = False) -> None:
    """Show versions, devices, compilers and caches, and what is missing."""
    report = examine()
    if as_json:
        print(json.dumps(report))
        return
    console = Console(highlight=False, soft_wrap=True)
    for section, entries in report.items():
        if section == "advice":
            continue
        console.print(section, style="bold")
        for name, value in entries.items():
            console.print(f"  {name:<24}{value}", markup=False)
    for line in report["advice"]:
        console.print(f"! {line}", style="yellow", markup=False)
    if not report["advice"]:
        console.print("nothing is missing", style="green")
