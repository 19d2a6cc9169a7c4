"""Factors and forecasts for the tiny DiT, and how far a run is from the oracle's."""

from dataclasses import replace

import torch

import stepgraph as sg
from helpers.oracle import Oracle, run_loop
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_scheduler
from stepgraph.compiler.lowrank.map_errors import error_on
from stepgraph.plan.corrections import Forecast

LINEARS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")


def maps_of(model, rank=4, whole: tuple[str, ...] = (), seed=0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random factors of every linear map inside the module sites; one map across the sites that are named `whole`."""
    torch.manual_seed(seed)
    width, maps = 32, {}
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        for name in LINEARS:
            linear = model.get_submodule(f"{block}.{name}")
            maps[f"{block}.{name}"] = (torch.randn(linear.out_features, rank) / 8, torch.randn(rank, linear.in_features) / 8)
        for name in whole:
            maps[f"{block}.{name}"] = (torch.randn(width, rank) / 8, torch.randn(rank, width) / 8)
    return maps


def factors_of(model, maps, affine=None) -> sg.Factors:
    header = sg.make_plan("full", model=model, scheduler=tiny_scheduler("ddim"), steps=1).header
    return sg.Factors(header.model, header.fingerprint, header.dtype, "svd", {}, maps, affine or {})


def plan_of(model, actions, forecasts=None, scheduler=None, **options) -> sg.CachePlan:
    """A plan with forecasts given as (step, site) -> (terms, coefficients)."""
    steps = len(next(iter(actions.values())))
    scheduler = scheduler or tiny_scheduler("ddim")
    plan = sg.make_plan("manual", model=model, scheduler=scheduler, steps=steps, actions=actions, **options)
    rows = {(s, plan.index(site)): Forecast(*f) for (s, site), f in (forecasts or {}).items()}
    return replace(plan, forecasts=rows)


def measured_errors(model, factors: sg.Factors, covariances: sg.Covariances) -> dict[str, float]:
    """Relative weighted error of every map on measured increments."""
    return {path: error_on(model, path, a, b, factors.method, covariances) for path, (a, b) in factors.maps.items()}


def both(model, plan, maps=None, tables=None, scheduler=None, guidance_scale=1.0, **options):
    """Final latents of the executable and of the oracle, and the executable."""
    scheduler = scheduler or tiny_scheduler("ddim")
    factors = factors_of(model, maps or {}, tables) if maps or tables else None
    exe = sg.compile(model, plan, inputs(2), factors=factors, **({"backend": "eager", "exact": True} | options))
    arguments = (scheduler, noise(2), plan.header.steps, guidance_scale, labels(1, 2), labels(NULL_CLASS, NULL_CLASS))
    separate = {"separate": plan.header.guidance == "separate"}
    wanted = run_loop(Oracle.of(model, plan, maps, tables), *arguments, **separate)[0]
    return run_loop(exe.session(), *arguments, **separate)[0], wanted, exe
