"""Increments on a corrected plan's own runs, against hooks on the eager model at the states that the oracle comes to."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import stepgraph as sg
from helpers.oracle import Oracle, run_loop
from helpers.tiny import inputs, tiny_scheduler
from stepgraph.compiler.lowrank.covariances import Covariances, measure_covariances
from stepgraph.compiler.lowrank.factorize import factorize
from stepgraph.errors import PlanError
from stepgraph.plan.corrections import Forecast

STEPS, SAMPLES, SEED, SCALE = 6, 2, 3, 2.0
RUNS = {"samples": SAMPLES, "seed": SEED, "guidance_scale": SCALE}
SITES = [f"transformer_blocks.{block}.{name}" for block in range(2) for name in ("attn1", "ff")]
ROWS = {"attn": "CLLCLL", "ff": "CCRLCL"}


def corrected(model, guidance="batched", around=False) -> sg.CachePlan:
    plan = sg.make_plan("manual", model=model, scheduler=tiny_scheduler("ddim"), steps=STEPS, guidance=guidance, actions=ROWS)
    if not around:
        return plan
    late = {
        (s, i): Forecast(("y1", "y2"), ((1.5, -0.5),) * len(plan.header.branches)) for s in (5,) for i in range(len(plan.sites))
    }
    return replace(plan, forecasts={cell: own for cell, own in late.items() if plan.rows[cell[0]][cell[1]] == "L"})


@pytest.fixture(scope="module")
def first(dit) -> dict[str, sg.Factors]:
    """Factors of full runs."""
    measured = measure_covariances(dit, tiny_scheduler("ddim"), steps=STEPS, whole=True, **RUNS)
    return {method: factorize(dit, measured, method=method, rank=4) for method in ("cov", "whole")}


def states_of(model, plan, maps) -> list[list[list[dict[str, torch.Tensor]]]]:
    """What the model is given, by run, step and branch, where the oracle answers it."""
    generator, runs = torch.Generator().manual_seed(SEED), []
    null, branches = model.config.num_embeds_ada_norm, len(plan.header.branches)
    for number in range(SAMPLES):
        oracle, taken = Oracle.of(model, plan, maps), []

        def predict(oracle=oracle, taken=taken, **given):
            taken.append({name: value for name, value in given.items() if name != "return_dict"})
            return oracle(**given)

        noise = torch.randn(1, 4, 8, 8, generator=generator)
        labels = {"class_labels": torch.tensor([number])}, {"class_labels": torch.tensor([null])}
        run_loop(predict, tiny_scheduler("ddim"), noise, STEPS, SCALE, *labels, separate=branches == 2)
        runs.append([taken[i : i + branches] for i in range(0, len(taken), branches)])
    return runs


Pair = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def increments(model, plan, maps, site_of: dict[str, str]) -> dict[str, Pair]:
    """By module path, [rows, C] float64 of a module's input and output in the full model, where its site is corrected."""
    seen: dict[str, Pair] = {}

    def see(path: str):
        def hook(_, args, kwargs, out):
            seen[path] = ((args or [kwargs["hidden_states"]])[0].double(), out.double())

        return model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)

    hooks, found = [see(path) for path in site_of], {path: ([], []) for path in site_of}
    for run in states_of(model, plan, maps):
        for branch in range(len(plan.header.branches)):
            stored: dict[str, list[Pair]] = {path: [] for path in site_of}
            for step, given in enumerate(run):
                model(**given[branch])
                for path, site in site_of.items():
                    letter, i = plan.rows[step][plan.index(site)], plan.index(site)
                    if letter == "L":
                        weights = plan.forecasts[step, i].coefficients[branch] if (step, i) in plan.forecasts else (1.0,)
                        for side in (0, 1):
                            then = sum(c * stored[path][-1 - age][side] for age, c in enumerate(weights))
                            found[path][side].append((seen[path][side] - then).flatten(0, -2))
                    if letter == "C":
                        stored[path].append(seen[path])
    for hook in hooks:
        hook.remove()
    return {path: (torch.cat(read), torch.cat(gave)) for path, (read, gave) in found.items()}


@pytest.mark.parametrize("method", ["cov", "whole"])
@pytest.mark.parametrize(("guidance", "around"), [("batched", False), ("separate", False), ("batched", True)])
def test_increments_are_those_at_the_plans_own_states(dit, first, method, guidance, around):
    plan, factors = corrected(dit, guidance, around), first[method]
    found = measure_covariances(dit, tiny_scheduler("ddim"), plan=plan, factors=factors, whole=method == "whole", **RUNS)
    site_of = {path: next(site for site in SITES if path.startswith(site)) for path in found.inputs}
    for path, (dx, dy) in increments(dit, plan, factors.maps, site_of).items():
        site = site_of[path]
        wanted = dx.T @ dx / len(dx)
        assert found.numbers[found.name_of(path)]["rows"] == len(dx), path
        assert torch.allclose(found.matrix(path), wanted, rtol=1e-3, atol=1e-4 * float(wanted.diagonal().max())), path
        if path == site and method == "whole":
            cross, square = found.cross(site)
            assert torch.allclose(cross, dy.T @ dx / len(dx), rtol=1e-3, atol=1e-4 * float(cross.abs().max())), path
            assert square == pytest.approx(float(dy.square().sum(1).mean()), rel=1e-3)
    assert (found.periods, found.header.steps) == ((), STEPS)
    full = measure_covariances(dit, tiny_scheduler("ddim"), steps=STEPS, whole=method == "whole", **RUNS)
    path = "transformer_blocks.1.ff.net.2"
    assert not torch.allclose(full.matrix(path), found.matrix(path), rtol=1e-2)


def test_factors_that_lack_nothing_lead_where_the_full_model_goes(dit):
    exact = {}
    for path, module in dit.named_modules():
        if isinstance(module, nn.Linear) and (".attn1." in path or ".ff." in path):
            u, s, v = torch.linalg.svd(module.weight.detach().double(), full_matrices=False)
            exact[path] = ((u * s).float(), v.float())
    scheduler = tiny_scheduler("ddim")
    plan = sg.lowrank(sg.make_plan("interval", model=dit, scheduler=scheduler, steps=STEPS, every=2))
    factors = sg.Factors(plan.header.model, plan.header.fingerprint, plan.header.dtype, "svd", {}, exact)
    own = measure_covariances(dit, scheduler, plan=plan, factors=factors, **RUNS)
    full = measure_covariances(dit, scheduler, steps=STEPS, period=2, **RUNS)
    assert own.inputs == full.inputs
    for path in full.inputs:
        wanted = full.matrix(path)
        assert torch.allclose(own.matrix(path), wanted, rtol=1e-3, atol=1e-4 * float(wanted.diagonal().max())), path


def test_a_memory_limit_gives_the_same_and_the_file_says_whose_runs(dit, first, tmp_path):
    plan = corrected(dit)
    settings = {"plan": plan, "factors": first["cov"], **RUNS}
    progress: list[tuple[int, int]] = []
    whole = measure_covariances(dit, tiny_scheduler("ddim"), **settings)
    parts = measure_covariances(
        dit, tiny_scheduler("ddim"), memory_gb=120e-6, on_step=lambda *p: progress.append(p), **settings
    )
    assert parts.passes > 1
    assert progress == [(n + 1, parts.passes * SAMPLES * STEPS) for n in range(parts.passes * SAMPLES * STEPS)]
    assert all(torch.equal(parts.tensors[name], tensor) for name, tensor in whole.tensors.items())
    whole.save(tmp_path / "own.safetensors")
    assert Covariances.load(tmp_path / "own.safetensors").plan == whole.plan != ""
    other = measure_covariances(dit, tiny_scheduler("ddim"), plan=plan, factors=factorize(dit, method="svd", rank=4), **RUNS)
    assert other.plan != whole.plan
    made = factorize(dit, whole, rank=4)
    assert (made.arguments["plan"], made.arguments["periods"]) == (whole.plan, [])


def test_only_corrected_sites_are_measured(dit, first):
    plan = sg.make_plan(
        "manual",
        model=dit,
        scheduler=tiny_scheduler("ddim"),
        steps=3,
        actions={"transformer_blocks.1.ff": "CRL", "attn": "CRC"},
    )
    found = measure_covariances(dit, tiny_scheduler("ddim"), plan=plan, factors=first["cov"], **RUNS)
    assert set(found.inputs) == {"transformer_blocks.1.ff.net.0.proj", "transformer_blocks.1.ff.net.2"}
    assert found.numbers[found.name_of("transformer_blocks.1.ff.net.2")]["rows"] == SAMPLES * 2 * 16
    made = factorize(dit, found, rank=4)
    assert set(made.maps) == set(found.inputs)
    assert sg.compile(dit, plan, inputs(2), backend="eager", factors=made).plan.header.factors == made.digest
    with pytest.raises(PlanError, match=r"no covariance of 'transformer_blocks\.0\.attn1\.to_q' was measured"):
        factorize(dit, found, rank=4, kinds=["attn"])
    with pytest.raises(PlanError, match=r"no covariance of 'transformer_blocks\.0\.attn1' was measured; .* whole=True"):
        factorize(dit, found, method="whole", rank=4)
    with pytest.raises(PlanError, match=r"the plan corrects no site of the kinds \['attn'\]; leave out kinds"):
        measure_covariances(dit, tiny_scheduler("ddim"), plan=plan, factors=first["cov"], kinds=["attn"], **RUNS)


def test_what_does_not_go_with_a_plan_is_refused(dit, first):
    plan, scheduler = corrected(dit), tiny_scheduler("ddim")
    stale = sg.make_plan("interval", model=dit, scheduler=scheduler, steps=STEPS, every=2)
    cases = [
        ({"plan": plan, "period": 2}, "period is 2, but a plan is given"),
        ({"plan": plan, "steps": 9}, "the plan is of 6 steps, asked for are 9; leave out steps"),
        ({"steps": STEPS}, "factors are given without the plan"),
        ({"plan": stale}, "the plan has no LOWRANK site whose increments could be measured"),
        ({"plan": plan, "factors": None}, "but no factors are given"),
        ({"plan": corrected(dit, "none")}, "the plan is for guidance 'none'; the guidance_scale 2 does not go with it"),
        (
            {"plan": corrected(dit, "separate"), "guidance_scale": 1.0},
            "the plan is for guidance 'separate'; the guidance_scale 1",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(PlanError, match=message):
            measure_covariances(dit, scheduler, **{"factors": first["cov"], **RUNS, **changes})
    with pytest.raises(PlanError, match="compiled for DDIMScheduler, but the given scheduler has EulerDiscrete"):
        measure_covariances(dit, tiny_scheduler("euler"), plan=plan, factors=first["cov"], **RUNS)
