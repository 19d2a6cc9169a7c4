"""Benchmark records: what was measured, on what, with which versions and by which command."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from stepgraph.files.whole_file import whole_file

CHECKOUT = Path(__file__).resolve().parent.parent


def _commit() -> str:
    described = subprocess.run(
        ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip()


# Asked at the start of the process: by the time it writes its results, somebody may have committed.
COMMIT = _commit()


def provenance(device: str) -> dict[str, Any]:
    """Device, versions, commit and command of this process."""
    on_cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else on_cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
        "commit": COMMIT or "unknown",
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
    }


def write_record(path: Path, device: str, results: dict[str, Any]) -> None:
    """Write results with their provenance as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps({**provenance(device), "results": results}, indent=2) + "\n", encoding="utf-8")


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name
