"""Policies: the plans they make, and the arguments they refuse."""

import pytest
import torch
from torch import nn

import stepgraph as sg
from helpers.tiny import tiny_scheduler
from stepgraph.compiler.policies import POLICIES
from stepgraph.errors import PlanError
from stepgraph.plan import MODULE_KINDS


def make(dit, policy="interval", steps=6, scheduler="ddim", **arguments):
    return sg.make_plan(policy, model=dit, scheduler=tiny_scheduler(scheduler), steps=steps, **arguments)


def column(plan, name: str) -> str:
    index = next(i for i, site in enumerate(plan.sites) if name in (site.name, site.kind))
    return "".join(row[index] for row in plan.rows)


def test_full_computes_everything(dit):
    plan = make(dit, "full")
    assert plan.rows == ("C" * 9,) * 6
    assert plan.summary().ideal_speedup == 1.0
    assert (plan.header.policy, plan.header.arguments, plan.header.branches) == ("full", {}, ("all",))


# Arguments -> the columns of attn, ff and hidden.
INTERVALS = [
    ({}, "CRCRCR", "CRCRCR", "CCCCCC"),
    ({"every": 1}, "CCCCCC", "CCCCCC", "CCCCCC"),
    ({"every": 3}, "CRRCRR", "CRRCRR", "CCCCCC"),
    ({"every": 9}, "CRRRRR", "CRRRRR", "CCCCCC"),
    ({"every": 3, "offset": 2}, "CRCRRC", "CRCRRC", "CCCCCC"),
    ({"every": 3, "offset": 5}, "CRCRRC", "CRCRRC", "CCCCCC"),
    ({"every": {"attn": 2, "ff": 3}}, "CRCRCR", "CRRCRR", "CCCCCC"),
    ({"every": {"attn": 2}}, "CRCRCR", "CCCCCC", "CCCCCC"),
    ({"every": 2, "offset": {"ff": 1}}, "CRCRCR", "CCRCRC", "CCCCCC"),
    ({"kinds": ["ff"]}, "CCCCCC", "CRCRCR", "CCCCCC"),
    ({"kinds": ["hidden"], "every": 3}, "C..C..", "C..C..", "CRRCRR"),
    ({"kinds": ["ff", "hidden"], "every": {"ff": 2, "hidden": 4}}, "C...C.", "C...C.", "CRRRCR"),
    ({"kinds": []}, "CCCCCC", "CCCCCC", "CCCCCC"),
]


@pytest.mark.parametrize(("arguments", "attn", "ff", "hidden"), INTERVALS, ids=str)
def test_interval(dit, arguments, attn, ff, hidden):
    plan = make(dit, **arguments)
    assert (column(plan, "attn"), column(plan, "ff"), column(plan, "hidden")) == (attn, ff, hidden)
    assert column(plan, "transformer_blocks.1.ff") == ff
    assert dict(plan.header.arguments) == {"every": 2, "offset": 0, "kinds": None} | arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every is 0 for attn; expected a whole number of at least 1"),
        ({"every": 2.0}, "every is 2.0 for attn"),
        ({"every": True}, "every is True for attn"),
        ({"every": {"ff": -1}}, "every is -1 for ff"),
        ({"offset": -1}, "offset is -1 for attn; expected a whole number of at least 0"),
        ({"offset": "x"}, "offset is 'x' for attn"),
        ({"kinds": ["mlp"]}, "unknown kind 'mlp'; this model has attn, ff, block"),
        ({"every": {"nose": 2}}, "unknown kind 'nose'"),
        ({"evry": 2}, "the policy 'interval' has no argument 'evry'; it takes every, offset, kinds"),
    ],
    ids=str,
)
def test_bad_arguments_of_interval(dit, arguments, message):
    with pytest.raises(PlanError, match=message):
        make(dit, **arguments)


def test_interval_as_fora_counts_it(dit):
    """FORA counts steps down to 0 and computes those divisible by N."""
    for steps, every in ((6, 4), (7, 3), (5, 2)):
        plan = make(dit, steps=steps, every=every, offset=(steps - 1) % every)
        wanted = "".join("C" if s == 0 or (steps - 1 - s) % every == 0 else "R" for s in range(steps))
        assert column(plan, "ff") == wanted


def test_heun_plans_have_a_row_per_evaluation(dit):
    plan = make(dit, steps=4, scheduler="heun")
    assert (plan.header.steps, plan.steps) == (4, 7)
    assert column(plan, "ff") == "CRCRCRC"
    # Repeated timesteps are told apart by order.
    assert plan.header.timesteps[1] == plan.header.timesteps[2]


def test_manual(dit):
    plan = make(dit, "manual", actions={"transformer_blocks.1.ff": "CRRRRR", "ff": "CCCCRR", "output": "CCRCCC"})
    assert column(plan, "transformer_blocks.0.ff") == "CC.CRR"
    assert column(plan, "transformer_blocks.1.ff") == "CR.RRR"
    assert column(plan, "output") == "CCRCCC"
    with pytest.raises(PlanError, match="the policy 'manual' needs the argument 'actions'"):
        make(dit, "manual")
    with pytest.raises(PlanError, match="unknown site or kind 'nose'"):
        make(dit, "manual", actions={"nose": "CCCCCC"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "nose"}, "unknown policy 'nose'; known: deepcache, full, interval, invardiff"),
        ({"policy": "interval"}, r"the policy 'interval' needs model, scheduler, steps \(or stats"),
        ({"policy": "full", "steps": 3}, "needs model, scheduler "),
    ],
)
def test_what_is_missing_is_named(given, message):
    with pytest.raises(PlanError, match=message):
        sg.make_plan(**given)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "4"])
def test_steps_must_be_a_number(dit, steps):
    with pytest.raises(PlanError, match=f"steps is {steps!r}; expected a whole number"):
        make(dit, steps=steps)


def test_guidance_gives_the_branches(dit):
    assert make(dit, guidance="separate").header.branches == ("cond", "uncond")
    assert make(dit, guidance="none").header.branches == ("all",)
    with pytest.raises(PlanError, match="guidance is 'nose'"):
        make(dit, guidance="nose")


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_described(name):
    assert POLICIES[name].source
    assert POLICIES[name].decide.__doc__
    assert set(MODULE_KINDS) >= {"attn", "ff"}


def test_the_inputs_of_a_class_without_an_adapter_are_asked_for(ddim):
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    with pytest.raises(sg.CompileError, match=r"no adapter knows what Sequential is called with.*example_inputs="):
        sg.make_plan("full", model=model, scheduler=ddim, steps=2)
    with pytest.raises(sg.CompileError, match="no transformer blocks in Sequential"):
        sg.make_plan("full", model=model, scheduler=ddim, steps=2, example_inputs={"input": torch.ones(2, 2)})
