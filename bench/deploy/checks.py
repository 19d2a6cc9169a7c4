"""What the checks at the beginning of a run cost on the module trees of full-size models, whose widths are tiny here.

    python -m stepgraph.bench.deploy.checks --out bench/results

The number of modules, attributes and tensors is the full model's, and so is the time that the checks of facts and of the places
of tensors take; they do not look at contents, so that widths do not matter. Digests of contents are another matter, and grow
with the bytes. Beside the time stands its share of the time that one eager call of the same tree takes, which is mostly that of
Python and of torch's calls at these widths: what the host spends on a step, whatever the device.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_rows
from stepgraph.compiler.tracing.trace import trace
from stepgraph.runtime.program.bound_weights import BoundWeights
from stepgraph.runtime.program.watch import FactsWatch

# Blocks as in the full models, heads and widths as small as they can be.
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 28,
       "sample_size": 8, "num_embeds_ada_norm": 10}  # fmt: skip
FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True}  # fmt: skip


def dit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """DiT-XL/2's tree, and inputs of two rows."""
    inputs = {"hidden_states": torch.zeros(2, 4, 8, 8), "timestep": torch.zeros(2, dtype=torch.int64)}
    return diffusers.DiTTransformer2DModel(**DIT).eval(), {**inputs, "class_labels": torch.zeros(2, dtype=torch.int64)}


def flux() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """FLUX.1-dev's tree, and inputs of one row."""
    return diffusers.FluxTransformer2DModel(**FLUX).eval(), {
        "hidden_states": torch.zeros(1, 16, 4), "encoder_hidden_states": torch.zeros(1, 5, 12),
        "pooled_projections": torch.zeros(1, 10), "timestep": torch.full((1,), 0.7), "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3), "guidance": torch.full((1,), 3.5),
    }  # fmt: skip


TREES: Mapping[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]] = {"DiT-XL/2": dit, "FLUX.1-dev": flux}


def cost_of(model: nn.Module, inputs: Mapping[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    """Milliseconds of the checks and of one eager call, the least of some rounds in turns."""
    watch = FactsWatch(trace(model, inputs).facts)
    weights = BoundWeights(model)

    def check() -> None:
        assert not watch.follow(model)
        weights.present(watch.tree)

    def call() -> None:
        model(**inputs)

    check()
    least = {"checks": float("inf"), "eager_call": float("inf")}
    with torch.no_grad():
        for number in range(rounds):
            # Ten checks in the time of a call and less.
            for what, work in (*[("checks", check)] * 10, *([("eager_call", call)] if number % 5 == 0 else [])):
                begun = time.perf_counter()
                work()
                least[what] = min(least[what], (time.perf_counter() - begun) * 1e3)
    counts = {"modules": sum(1 for _ in model.modules()), "tensors": len(weights.names)}
    return {**counts, "checks_ms": least["checks"], "of_an_eager_call": least["checks"] / least["eager_call"]}


def main() -> None:
    """Measure and print a table; with `--out` also write a record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="folder for the record")
    parser.add_argument("--rounds", type=int, default=200, help="of ten checks each (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    costs = {name: cost_of(*make(), arguments.rounds) for name, make in TREES.items()}
    rows = [{"tree": name, **cost} for name, cost in costs.items()]
    show_rows("Checks at the beginning of a run", rows, list(rows[0]), ".3g")
    if arguments.out is not None:
        write_record(arguments.out / "checks-cpu.json", "cpu", costs)


if __name__ == "__main__":
    main()
