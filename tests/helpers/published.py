"""Small files of published plan formats."""

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

import stepgraph as sg
from stepgraph.plan import CachePlan

T, BLOCKS = 4, 2


def imported(data: object, model, path: Path, steps: int = T, **options: object) -> CachePlan:
    """Write a file of a published format and import it."""
    if path.suffix == ".json":
        path.write_text(json.dumps(data))
    else:
        torch.save(data, path)
    return sg.import_plan(path, model, DDIMScheduler(), steps=steps, **options)


def column(plan: CachePlan, site: str) -> str:
    return "".join(row[plan.index(site)] for row in plan.rows)


def book(step=(0, 1, 0, 0), msa=((0, 0), (1, 1), (0, 0), (1, 0)), mlp=((0, 0), (1, 1), (0, 0), (0, 1))) -> dict[str, object]:
    return {
        "step_cache_book": [bool(flag) for flag in step],
        "msa_cache_book": [[bool(flag) for flag in row] for row in msa],
        "mlp_cache_book": [[bool(flag) for flag in row] for row in mlp],
    }


def flux_book(step: str = ".#..", **tables: tuple[str, ...]) -> dict[str, object]:
    """A book of four steps; tables like attn=("..", "##", ".#", ".."), `single_` ones with three letters a step."""
    double = {name: tables.get(name, ("..", "##", "..", "..")) for name in ("attn", "context_attn", "ff", "context_ff")}
    double["ip_attn"] = double["attn"]
    single = {name: tables.get(f"single_{name}", ("...", "###", "...", "...")) for name in ("attn", "mlp")}
    flags = lambda text: [letter == "#" for letter in text]  # noqa: E731
    return {
        "step_cache_book": flags(step),
        "transformer_cache_book": {name: [flags(row) for row in rows] for name, rows in double.items()},
        "single_transformer_cache_book": {name: [flags(row) for row in rows] for name, rows in single.items()},
    }


def imported_flux(data: object, model, path: Path, steps: int = T, **options: object) -> CachePlan:
    path.write_text(json.dumps(data))
    return sg.import_plan(path, model, FlowMatchEulerDiscreteScheduler(), steps=steps, **options)


def weightless_flux() -> FluxTransformer2DModel:
    """Two double and three single blocks, without weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(
            in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
        ).eval()  # fmt: skip
