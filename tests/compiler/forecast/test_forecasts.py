"""Forecasts by formula: weights against other derivations, and the plans and programs that they make."""

import diffusers
import numpy as np
import pytest
import torch

import stepgraph as sg
from helpers.distance import SAME_RUN, error
from helpers.oracle import Oracle, run_loop
from helpers.taylorseer import TaylorSeer
from helpers.tiny import inputs, labels, noise, tiny_scheduler
from stepgraph.compiler.forecast.forecasts import RULES, adams_bashforth, polynomial, taylor
from stepgraph.errors import PlanError
from stepgraph.plan import PlanHeader, Site
from stepgraph.plan.corrections import Forecast

UNEVEN = [[7.0, 3.0, 2.0, -4.0, -5.0], [100.0, 150.0, 170.0, 400.0, 410.0]]
NULL = {"negative_class_labels": torch.tensor([1000, 1000])}


def test_taylor_on_an_even_grid_of_four():
    assert taylor([8, 4, 0], 9, 1) == [1.25, -0.25]
    assert taylor([8, 4, 0], 9, 2) == [1.28125, -0.3125, 0.03125]
    # The unit of time, and its direction, do not matter.
    assert taylor([-800, -400, 0], -900, 2) == pytest.approx([1.28125, -0.3125, 0.03125], rel=1e-12)


@pytest.mark.parametrize("order", range(5))
def test_taylor_is_what_taylorseer_does_when_it_stores_value_after_value(order):
    rng = np.random.default_rng(0)
    for times in [*UNEVEN, [5.0, 4.0, 3.0, 2.0, 1.0]]:
        values, now = rng.normal(size=(5, 3)), 2 * times[0] - times[1] + 0.3
        method = TaylorSeer(order)
        for time, value in zip(times[::-1], values[::-1], strict=True):
            method.store(value, time)
        wanted = method.predict(now)
        np.testing.assert_allclose(np.array(taylor(times, now, order)) @ values[: order + 1], wanted, rtol=1e-9)


def test_taylor_is_exact_for_lines_only():
    for times in [*UNEVEN, [4.0, 3.0, 2.0, 1.0, 0.0]]:
        for order in range(1, 5):
            weights, own = np.array(taylor(times, 9.0, order)), np.array(times[: order + 1])
            assert weights @ (3 * own - 2) == pytest.approx(3 * 9.0 - 2)
            assert abs(weights @ own**2 - 81) > 0.1


def test_taylor_on_an_even_grid_leaves_terms_of_newtons_formula_out():
    values, s = np.random.default_rng(1).normal(size=5), 0.5
    differences = [np.diff(values[::-1], j)[-1] for j in range(5)]
    seer = sum(s**j / np.prod(range(1, j + 1)) * d for j, d in enumerate(differences))
    newton = sum(np.prod([s + k for k in range(j)]) / np.prod(range(1, j + 1)) * d for j, d in enumerate(differences))
    assert np.array(taylor([4, 3, 2, 1, 0], 4 + s, 4)) @ values == pytest.approx(seer)
    assert np.array(polynomial([4, 3, 2, 1, 0], 4 + s, 4)) @ values == pytest.approx(newton)
    assert abs(seer - newton) > 0.1


def test_taylor_divides_by_the_last_gap_alone():
    # Gaps 1 and 3: F_2 is (1 + 3) / 2 times what a divided difference, over the whole span, would make of it.
    weights = np.array(taylor([4, 3, 0], 5, 2)) - np.array([*taylor([4, 3], 5, 1), 0])
    second_derivative = 2 * np.array([1 / 4, -1 / 3, 1 / 12])
    np.testing.assert_allclose(weights, 1 / 2 * 2 * second_derivative, rtol=1e-12)


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("times", UNEVEN, ids=str)
def test_polynomial_and_its_mean_against_a_fit(order, times):
    values = np.random.default_rng(order).normal(size=order + 1)
    now = times[0] + 0.7 * (times[0] - times[1])
    through = np.polynomial.Polynomial.fit(times[: order + 1], values, order)
    assert np.array(polynomial(times, now, order)) @ values == pytest.approx(through(now), rel=1e-6)
    integral = through.integ()
    mean = (integral(now) - integral(times[0])) / (now - times[0])
    assert np.array(adams_bashforth(times, now, order)) @ values == pytest.approx(mean, rel=1e-6)


def test_adams_bashforth_has_its_classical_weights_one_gap_ahead():
    classical = {1: [3 / 2, -1 / 2], 2: [23 / 12, -16 / 12, 5 / 12], 3: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    for order, weights in classical.items():
        assert adams_bashforth([3, 2, 1, 0], 4, order) == pytest.approx(weights)


@pytest.mark.parametrize("rule", RULES)
def test_what_holds_for_every_rule(rule):
    assert RULES[rule]([5, 1], 9, 0) == [1.0]
    assert RULES[rule]([5, 1, 0], 5, 2) == pytest.approx([1, 0, 0])
    for order in range(5):
        assert sum(RULES[rule](UNEVEN[0], 8.5, order)) == pytest.approx(1)
    for order in (-1, 5, 1.0, True):
        with pytest.raises(PlanError, match=r"expected a whole number in 0\.\.4"):
            RULES[rule](UNEVEN[0], 9, order)
    with pytest.raises(PlanError, match="order 2 takes 3 different times"):
        RULES[rule]([5, 5, 1], 9, 2)


# -- plans -----------------------------------------------------------------------------------------------------------------


def plan_of(dit, actions, scheduler="ddim", steps=6, **options):
    chosen = tiny_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
    return sg.make_plan("manual", model=dit, scheduler=chosen, steps=steps, actions=actions, **options)


def test_forecast_takes_the_highest_order_that_is_stored_and_says_where(dit):
    plan = plan_of(dit, {"ff": "CRCRCR", "attn": "CCCRRR"})
    made = sg.forecast(plan, order=2)
    assert [row[1] for row in made.rows] == list("CFCFCF")
    orders = {(s, made.sites[i].kind): len(f.terms) - 1 for (s, i), f in made.forecasts.items()}
    assert orders == {(1, "ff"): 0, (3, "ff"): 1, (5, "ff"): 2, (3, "attn"): 2, (4, "attn"): 2, (5, "attn"): 2}
    record = made.header.arguments["corrections"][-1]
    assert record == {"by": "forecast", "rule": "taylor", "order": 2, "around": False, "fallbacks": {"1": 0, "3": 1}}
    times = made.header.timesteps
    wanted = taylor([times[2], times[1], times[0]], times[4], 2)
    assert made.forecasts[4, 0] == Forecast(("y1", "y2", "y3"), (tuple(wanted),))
    assert sg.CachePlan.from_json(made.to_json()) == made


def test_forecast_changes_what_is_chosen(dit):
    plan = plan_of(dit, {"ff": "CRCRCR", "attn": "CCCRRR"}, guidance="separate")
    one = sg.forecast(plan, "polynomial", 1, sites=["transformer_blocks.1.ff"])
    assert {one.sites[i].name for _, i in one.forecasts} == {"transformer_blocks.1.ff"}
    assert [row[one.index("transformer_blocks.0.ff")] for row in one.rows] == list("CRCRCR")
    assert all(len(f.coefficients) == 2 for f in one.forecasts.values())
    both = sg.forecast(one, "adams_bashforth", 1, kinds=["attn"])
    assert [c["rule"] for c in both.header.arguments["corrections"]] == ["polynomial", "adams_bashforth"]
    assert both.forecasts.items() >= one.forecasts.items()


def test_values_of_one_timestep_count_once(dit):
    """Heun evaluates twice at every timestep but the first."""
    plan = sg.forecast(plan_of(dit, {"ff": "CCCFFCCCF"}, "heun", steps=5), order=2)
    times = plan.header.timesteps
    assert times[1] == times[2]
    assert times[7] == times[8]
    assert plan.forecasts[3, 1].terms == ("y1", "y3")
    # The last one stands at the timestep of the value before it, so that it is that value.
    assert plan.forecasts[8, 1].terms == ("y1", "y2", "y4")
    assert plan.forecasts[8, 1].coefficients[0] == pytest.approx((1, 0, 0))


def test_low_rank_plans(dit):
    plan = plan_of(dit, {"ff": "CRCRCR", "attn": "CCCRRR"})
    every = sg.lowrank(plan)
    assert [every.rows[s][:2] for s in (1, 3)] == ["CL", "LL"]
    assert not every.forecasts
    around = sg.lowrank(plan, kinds=["ff"], around="taylor")
    assert [around.rows[s][:2] for s in (1, 3)] == ["CL", "RL"]
    assert around.forecasts[3, 1].terms == ("y1", "y2")
    assert [c["by"] for c in around.header.arguments["corrections"]] == ["lowrank", "forecast"]
    assert sg.forecast(every, around=True).forecasts.keys() == {
        (s, i) for s, row in enumerate(every.rows) for i, a in enumerate(row) if a == "L"
    }


def flux_like() -> sg.CachePlan:
    """Two blocks as FLUX has them, without a model."""
    sites = [Site("b.0.attn", "attn", output=0), Site("b.0.attn", "context_attn", output=1), Site("b.0.ff", "ff")]
    sites += [Site("s.0.attn", "attn"), Site("s.0.act", "mlp"), Site("s.0.proj_out", "proj_out")]
    header = PlanHeader("M", "f/f", "S", "h", 3, (3, 2, 1), {"x": (4,)}, "float32", 10)
    return sg.CachePlan.build(header, sites, {"b.0.attn": "CRR", "context_attn": "CRR", "proj_out": "CRR", "b.0.ff": "CCR"})


def test_joint_outputs_and_projections_are_corrected_whole():
    plan = flux_like()
    assert plan.rows == ("CCCCCC", "RRC..R", "RRR..R")
    made = sg.lowrank(plan, kinds=["attn", "proj_out"], around="taylor")
    assert made.rows == ("CCCCCC", "LLCLCL", "LLRLCL")
    # The linear maps of a joint call lie with its first output, and so does their forecast.
    assert {i for _, i in made.forecasts} == {0, 3, 5}


BAD = {
    "rule": (lambda p: sg.forecast(p, "tylor"), "unknown rule 'tylor' of forecasts; known: taylor, polynomial, adams_bash"),
    "order": (lambda p: sg.forecast(p, order=5), r"the order is 5; expected a whole number in 0\.\.4"),
    "kind": (lambda p: sg.forecast(p, kinds=["nose"]), "unknown kind 'nose'; this model has attn, ff"),
    "kinds": (lambda p: sg.forecast(p, kinds="ff"), "kinds is 'ff'; expected a list, each entry a text"),
    "site": (lambda p: sg.forecast(p, sites=["nose"]), "unknown site 'nose'; the sites are"),
    "nothing": (lambda p: sg.forecast(p, kinds=["attn"]), "nothing to forecast: the chosen sites are nowhere R or F"),
    "stream": (lambda p: sg.lowrank(p, kinds=["hidden"]), "hidden is no module, and has no linear maps to correct"),
    "site of a stream": (
        lambda p: sg.lowrank(p, sites=["output"]),
        r"output is no module, and has no linear maps to correct; this model's modules: \['attn', 'ff'\]",
    ),
    "order around nothing": (lambda p: sg.lowrank(p, order=1), "order is 1, but no forecast to take increments around"),
    "order around": (lambda p: sg.lowrank(p, around="taylor", order=7), r"the order is 7; expected a whole number in 0\.\.4"),
    "no reuse": (lambda p: sg.lowrank(p, kinds=["attn"]), "nothing to correct: none of the chosen modules is reused"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_corrected_is_refused(dit, case):
    run, message = BAD[case]
    with pytest.raises(PlanError, match=message):
        run(plan_of(dit, {"ff": "CRCRCR"}))


# -- programs --------------------------------------------------------------------------------------------------------------


def flow() -> diffusers.FlowMatchEulerDiscreteScheduler:
    """Shifted, so that its timesteps are uneven."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize(("scheduler", "order"), [("ddim", 1), ("dpm++", 2), (flow, 3)], ids=["ddim", "dpm++", "flow"])
def test_modules_run_as_taylorseer_does(dit, scheduler, order):
    """Per module and step, on the real gaps between the timesteps; the factors are the oracle's own."""
    chosen = tiny_scheduler(scheduler) if isinstance(scheduler, str) else scheduler()
    plan = plan_of(dit, {"attn": "CCRCRR", "ff": "CCRRCR"}, chosen)
    exe = sg.compile(dit, sg.forecast(plan, order=order), inputs(2), backend="eager", exact=True)
    given = labels(1, 2)
    got = sg.sample(exe, chosen, noise(2), **given)

    class Seer(Oracle):
        def value(self, site, compute):
            time = plan.header.timesteps[self.calls]
            letter = self.letter(site)
            if letter == "R":
                return self.history[0][site].predict(time).float()
            if letter == "C":
                value = compute()
                self.history[0].setdefault(site, TaylorSeer(order)).store(value.double(), time)
                return value
            return super().value(site, compute)

    wanted, _ = run_loop(Seer.of(dit, plan), chosen, noise(2), 6, 1.0, given)
    assert error(got, wanted) <= SAME_RUN
    assert exe.providers()["linear_combination by reference"] == 2 * 3 + 2 * 3


@pytest.mark.parametrize("kind", ["stack_residual", "hidden", "output", "block"])
@pytest.mark.parametrize("guidance", ["batched", "separate"])
def test_every_kind_of_stream_is_forecast(dit, ddim, kind, guidance):
    made = sg.forecast(plan_of(dit, {kind: "CCRCRR"}, guidance=guidance), "polynomial", 1)
    exe = sg.compile(dit, made, inputs(2 if guidance == "separate" else 4), backend="eager", exact=True)
    got = sg.sample(exe, ddim, noise(2), 3.0, **labels(1, 2), **NULL)
    oracle = Oracle.of(dit, made)
    uncond = {"class_labels": NULL["negative_class_labels"]}
    wanted, _ = run_loop(oracle, ddim, noise(2), 6, 3.0, labels(1, 2), uncond, guidance == "separate")
    assert error(got, wanted) <= SAME_RUN
