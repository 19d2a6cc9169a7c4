"""Compiled plans against the oracle, bit for bit, for random plans under several schedulers and guidance modes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepgraph as sg
from helpers.oracle import Oracle, run_loop
from helpers.plans import plan_with_rows, random_rows
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_scheduler

SCHEDULERS = ("ddim", "dpm++", "euler", "heun")


def compare(model, plan, scheduler, batch: int, guidance_scale: float) -> tuple[sg.Executable, Oracle]:
    """Run a plan as program and as oracle; every output and the final latents must be equal, bit for bit."""
    separate = plan.header.guidance == "separate"
    cond, uncond = labels(*range(batch)), labels(*[NULL_CLASS] * batch)
    evaluated = batch if separate or guidance_scale <= 1 else 2 * batch
    exe = sg.compile(model, plan, inputs(evaluated), backend="eager", exact=True)
    oracle, session = Oracle.of(model, plan), exe.session()
    arguments = (scheduler, noise(batch), plan.header.steps, guidance_scale, cond, uncond, separate)
    wanted, wanted_outputs = run_loop(oracle, *arguments)
    got, outputs = run_loop(session, *arguments)
    for number, (output, expected) in enumerate(zip(outputs, wanted_outputs, strict=True)):
        assert torch.equal(output, expected), f"call {number}"
    assert torch.equal(got, wanted)
    assert torch.isfinite(got).all()
    assert session.finished
    assert session.slot_bytes == 0
    negative = {f"negative_{name}": value for name, value in uncond.items()} if guidance_scale > 1 else {}
    assert torch.equal(sg.sample(exe, scheduler, noise(batch), guidance_scale, **cond, **negative), wanted)
    return exe, oracle


def refuse_modules_that_did_not_run(exe: sg.Executable, oracle: Oracle) -> None:
    """No variant calls a module that the oracle left out in that step."""
    branches = len(exe.plan.header.branches)
    for step, variant in enumerate(exe.default.rows):
        called = {n.target for n in exe.default.variants[variant].graph.graph.nodes if n.op == "call_module"}
        ran = set(oracle.executed[step * branches])
        assert called <= ran, f"step {step} calls {sorted(called - ran)}"


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("batch", "guidance_scale"), [(1, 1.0), (3, 1.0), (1, 4.0), (3, 4.0)])
def test_computing_everything_is_the_eager_model(dit, name, batch, guidance_scale):
    scheduler = tiny_scheduler(name)
    plan = sg.make_plan("full", model=dit, scheduler=scheduler, steps=3)
    exe, oracle = compare(dit, plan, scheduler, batch, guidance_scale)
    cond, uncond = labels(*range(batch)), labels(*[NULL_CLASS] * batch)
    eager = run_loop(dit, scheduler, noise(batch), 3, guidance_scale, cond, uncond)[0]
    negative = {"negative_class_labels": uncond["class_labels"]} if guidance_scale > 1 else {}
    assert torch.equal(eager, sg.sample(exe, scheduler, noise(batch), guidance_scale, **cond, **negative))
    # The oracle by itself runs the whole model too: every leaf, the first block's embedder twice.
    assert {"pos_embed.proj", "proj_out_2", "transformer_blocks.1.ff.net.2"} <= set(oracle.executed[0])
    assert oracle.executed[0]["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"] == 2


@pytest.mark.parametrize("name", SCHEDULERS)
@settings(max_examples=6)
@given(data=st.data())
def test_random_plans(dit, name, data):
    scheduler = tiny_scheduler(name)
    full = sg.make_plan("full", model=dit, scheduler=scheduler, steps=4)
    rows = data.draw(random_rows(full.sites, full.steps))
    batch, guidance_scale = data.draw(st.sampled_from([(1, 1.0), (3, 1.0), (1, 4.0), (3, 4.0)]))
    plan = plan_with_rows(dit, scheduler, 4, rows)
    exe, oracle = compare(dit, plan, scheduler, batch, guidance_scale)
    refuse_modules_that_did_not_run(exe, oracle)


@settings(max_examples=8)
@given(data=st.data())
def test_random_plans_with_two_branches(dit, data):
    scheduler = tiny_scheduler(data.draw(st.sampled_from(["ddim", "dpm++"])))
    full = sg.make_plan("full", model=dit, scheduler=scheduler, steps=4, guidance="separate")
    plan = plan_with_rows(dit, scheduler, 4, data.draw(random_rows(full.sites, 4)), "separate")
    exe, oracle = compare(dit, plan, scheduler, data.draw(st.sampled_from([1, 3])), 4.0)
    refuse_modules_that_did_not_run(exe, oracle)
    assert oracle.calls == 8


@pytest.mark.parametrize("kind", ["attn", "ff", "block", "stack_residual", "hidden", "output"])
def test_every_kind_of_site_by_itself(dit, ddim, kind):
    plan = sg.make_plan("manual", model=dit, scheduler=ddim, steps=5, actions={kind: "CRCRR"})
    exe, oracle = compare(dit, plan, ddim, 2, 4.0)
    refuse_modules_that_did_not_run(exe, oracle)
    assert sum(oracle.executed[1].values()) < sum(oracle.executed[0].values())
    assert (kind == "output") == (not oracle.executed[1])


def test_reuse_changes_the_result(dit, ddim):
    """The oracle would be worthless if stored and fresh values were the same."""
    results = []
    for actions in ({}, {"attn": "CRRR"}, {"ff": "CRRR"}, {"stack_residual": "CRRR"}, {"hidden": "CRRR"}, {"output": "CRRR"}):
        plan = sg.make_plan("manual", model=dit, scheduler=ddim, steps=4, actions=actions)
        results.append(run_loop(Oracle.of(dit, plan), ddim, noise(), 4, 1.0, labels(1))[0])
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_the_oracle_leaves_the_model_as_it_was(dit, ddim):
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=2)
    before = dit(**inputs()).sample
    run_loop(Oracle.of(dit, plan), ddim, noise(), 2, 1.0, labels(1))
    assert all("forward" not in module.__dict__ and not module._forward_pre_hooks for module in dit.modules())
    assert torch.equal(dit(**inputs()).sample, before)
