"""Files of trained routers, and the plans that follow."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

import stepgraph as sg
from helpers.routers import SMALL, train
from helpers.tiny import labels, noise, tiny_dit
from stepgraph.compiler.routers.router import Router
from stepgraph.errors import PlanError
from stepgraph.fingerprint import fingerprint


def test_a_router_file_is_read_back(router, tmp_path):
    path = tmp_path / "router.safetensors"
    router.save(path)
    again = Router.load(path)
    assert torch.equal(again.logits, router.logits)
    assert torch.equal(again.history, router.history)
    assert (again.header, again.sites, again.settings) == (router.header, router.sites, router.settings)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PlanError, match="not a complete stepgraph-router file"):
        Router.load(path)


def test_theta_decides(model, router, tmp_path):
    path = tmp_path / "router.safetensors"
    logits = torch.tensor([[-9.0] * 4, [2.0, -2.0, 0.0, 3.0], [-9.0] * 4, [-1.0, 1.0, -3.0, 0.5]])
    replace(router, logits=logits).save(path)
    wanted = {0.0: ["CCCC", "CCCC"], 0.1: ["CCCC", "CCRC"], 0.5: ["CRRC", "RCRC"], 0.9: ["RRRC", "RRRR"], 1.0: ["RRRR", "RRRR"]}
    for theta, rows in wanted.items():
        plan = sg.make_plan("l2c", model=model, scheduler=DDIMScheduler(), steps=4, router=str(path), theta=theta)
        assert ["".join(row[i] for i in (0, 1, 3, 4)) for row in plan.rows] == ["CCCC", rows[0], "CCCC", rows[1]]
        assert (plan.header.policy, plan.header.arguments["theta"]) == ("l2c", theta)
    json.dumps(dict(plan.header.arguments))


def test_the_policy_trains_and_its_plan_runs(model, router):
    arguments = {"iterations": 6, "batch": 8, "pool": 8}
    plan = sg.make_plan("l2c", model=model, scheduler=DDIMScheduler(), steps=4, **arguments)
    modules = [i for i, site in enumerate(plan.sites) if site.kind in ("attn", "ff")]
    reused = torch.tensor([[row[i] == "R" for i in modules] for row in plan.rows])
    assert torch.equal(reused, router.reused(0.5))
    exe = sg.compile(model, plan, sg.example_inputs(model), backend="eager", exact=True)
    assert sg.sample(exe, DDIMScheduler(), noise(), **labels(3)).isfinite().all()


def test_statistics_and_a_router_file_are_enough(model, router, tmp_path):
    router.save(tmp_path / "router.safetensors")
    stats = sg.calibrate(model, DDIMScheduler(), steps=4, samples=1)
    plan = sg.make_plan("l2c", stats, router=str(tmp_path / "router.safetensors"))
    assert plan.header.policy == "l2c"
    with pytest.raises(PlanError, match="routers are trained on the model: pass model= and scheduler="):
        sg.make_plan("l2c", stats)


def test_the_papers_checkpoint_form_reads_back_to_the_same_plan(model, router, tmp_path):
    scattered = replace(router, logits=torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) * 3)
    scattered.save(tmp_path / "router.safetensors")
    scattered.export(tmp_path / "router.pt")
    for theta in (0.1, 0.5, 0.9):
        options = {"model": model, "scheduler": DDIMScheduler(), "steps": 4, "theta": theta}
        plan = sg.make_plan("l2c", router=str(tmp_path / "router.safetensors"), **options)
        assert sg.import_plan(tmp_path / "router.pt", **options).rows == plan.rows
        assert any("R" in row for row in plan.rows)


@pytest.mark.parametrize(("steps", "changes"), [(5, {}), (6, {"run": 2}), (6, {"shift": 1})], ids=str)
def test_what_the_papers_form_cannot_say_is_not_written(model, tmp_path, steps, changes):
    trained = train(model, steps=steps, settings=replace(SMALL, iterations=1, **changes))
    with pytest.raises(PlanError, match="L2C's form holds pairs over an even number of steps"):
        trained.export(tmp_path / "router.pt")
    assert not (tmp_path / "router.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"theta": 1.5}, r"theta is 1\.5; expected a probability in 0\.\.1"),
        ({"preset": "nose"}, "unknown preset 'nose'; known: dit, u-vit, quick"),
        ({"router": "none.safetensors"}, r"no file at none\.safetensors; train routers with"),
        ({"router": "none.safetensors", "lam": 1.0}, "the setting 'lam' has no effect"),
        ({"batch": 0}, "batch is 0; expected a whole number of at least 1"),
        ({"lam": -1.0}, r"lam is -1\.0; expected a number of at least 0"),
        ({"lr": 0}, "lr is 0; expected a number above 0"),
        ({"states": "nose"}, "states is 'nose'; expected one of q_sample, trajectory"),
        ({"train": None}, "no argument 'train'"),
        ({"shift": 3}, "with run 1 and shift 3 none of the 4 steps is routed"),
    ],
    ids=str,
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(PlanError, match=message):
        sg.make_plan("l2c", model=model, scheduler=DDIMScheduler(), steps=4, **arguments)


def test_a_router_of_another_model_or_schedule_is_refused(router, tmp_path):
    router.save(tmp_path / "router.safetensors")
    options = {"scheduler": DDIMScheduler(), "router": str(tmp_path / "router.safetensors")}
    with pytest.raises(PlanError, match="trained for fingerprint"):
        sg.make_plan("l2c", model=tiny_dit(seed=1), steps=4, **options)
    with pytest.raises(PlanError, match="trained for steps 4, but the plan is for 6"):
        sg.make_plan("l2c", model=tiny_dit(), steps=6, **options)
    # One that was trained before contents were told by sums fits its model still.
    old = replace(router, header=replace(router.header, fingerprint=fingerprint(tiny_dit(), like="0/0")))
    old.save(tmp_path / "router.safetensors")
    plans = [sg.make_plan("l2c", model=tiny_dit(), steps=4, **options)]
    router.save(tmp_path / "router.safetensors")
    plans.append(sg.make_plan("l2c", model=tiny_dit(), steps=4, **options))
    assert plans[0].rows == plans[1].rows
    old.save(tmp_path / "router.safetensors")
    with pytest.raises(PlanError, match="trained for fingerprint"):
        sg.make_plan("l2c", model=tiny_dit(seed=1), steps=4, **options)
