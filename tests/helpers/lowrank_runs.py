"""A whole LOWRANK sampling run of glyph-dit, or of its first blocks, on some provider, against the oracle."""

from dataclasses import replace

import torch

import stepgraph as sg
from helpers.oracle import Oracle, run_loop
from helpers.small_glyphs import small_glyph_dit
from helpers.tiny import tiny_scheduler

OPERATIONS = {"modulated_norm", "gated_residual", "lowrank_delta", "lowrank_input"}


def run_glyph_dit(steps: int, rank: int = 8, layers: int = 10) -> tuple[float, dict[str, int]]:
    """Relative L2 between the final latents of executable and oracle with SVD factors, every second step corrected; and who ran
    the executable's operations.
    """
    model = small_glyph_dit(layers)
    scheduler = tiny_scheduler("ddim")
    plan = sg.lowrank(sg.make_plan("interval", model=model, scheduler=scheduler, steps=steps, every=2))
    factors = sg.factorize(model, method="svd", rank=rank)
    plan = replace(plan, header=replace(plan.header, factors=factors.digest))
    exe = sg.compile(model, plan, sg.example_inputs(model, 2), backend="eager", factors=factors)
    config = model.config
    latents = torch.randn(
        2, config.in_channels, config.sample_size, config.sample_size, generator=torch.Generator().manual_seed(0)
    )
    arguments = (scheduler, latents, steps, 1.0, {"class_labels": torch.tensor([1, 2])}, None)
    wanted = run_loop(Oracle.of(model, plan, dict(factors.maps)), *arguments)[0]
    got = run_loop(exe.session(), *arguments)[0]
    return float((got - wanted).norm() / wanted.norm()), exe.providers()
