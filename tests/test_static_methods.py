"""The published static methods, each derived once more by a plain loop that shares nothing with the policy."""

import json

import numpy as np
import pytest
import torch
from conftest import noise, tiny_dit, tiny_scheduler
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from oracle import Oracle, run_loop
from test_calibrate import watched_values

import stepgraph as sg
from stepgraph.compiler.policies import POLICIES
from stepgraph.plan import PlanError

STEPS, SAMPLES, SEED = 12, 2, 4


@pytest.fixture(scope="module")
def model():
    return tiny_dit(num_layers=3)


@pytest.fixture(scope="module")
def stats(model):
    return sg.calibrate(model, tiny_scheduler("ddim"), steps=STEPS, samples=SAMPLES, seed=SEED)


@pytest.fixture(scope="module")
def features(model) -> list[list[dict[str, np.ndarray]]]:
    """Saved values of every site by sample and step, from forward hooks on the eager model."""
    runs = watched_values(model, tiny_scheduler("ddim"), SAMPLES, steps=STEPS, seed=SEED)
    return [[{name: value.double().numpy() for name, value in step.items()} for step in run] for run in runs]


def distance(a, b):
    return np.abs(a - b + 1e-8).sum()


def rates(features, name, provisional=None):
    """InvarDiff's rates of one site, [T]; with provisional hits, its resampling correction."""
    table = np.zeros((len(features), STEPS))
    for row, run in zip(table, features, strict=True):
        z = [step[name] for step in run]
        previous, current, frozen = z[0], z[1], False
        for s in range(2, STEPS):
            row[s - 1] = distance(z[s], current) / distance(current, previous)
            if provisional is None or not provisional[s - 1]:
                previous, current, frozen = current, z[s], False
            elif not frozen:
                previous, current, frozen = current, z[s], True
    mean = table.mean(axis=0)
    mean[0] = mean[-1] = 1.0
    return mean


def invardiff_by_hand(features, blocks, taus, nonskip, phase2):
    """The booleans of the method for a DiT: step gate [T], and modules [T][blocks] by kind."""
    names = {"attn": [f"transformer_blocks.{i}.attn1" for i in range(blocks)]}
    names |= {"ff": [f"transformer_blocks.{i}.ff" for i in range(blocks)], "hidden": ["hidden"]}
    protected = max(1, int(nonskip * STEPS))

    def decide(provisional):
        hits = {}
        for kind, own in names.items():
            table = np.stack([rates(features, n, None if provisional is None else provisional[n]) for n in own], axis=1)
            limit = np.quantile(table[1:-1].ravel(), taus[kind])
            for column, n in enumerate(own):
                hits[n] = [protected <= s < STEPS - 1 and table[s, column] < limit for s in range(STEPS)]
        return hits

    hits = decide(None)
    if phase2:
        hits = decide(hits)
    for s in range(STEPS):
        if hits["hidden"][s]:
            for n in names["attn"] + names["ff"]:
                hits[n][s] = True
                if s + 1 < STEPS:
                    hits[n][s + 1] = False
    return hits


@pytest.mark.parametrize("phase2", [False, True])
@pytest.mark.parametrize(("step", "attn", "ff", "nonskip"), [(0.61, 0.2, 0.2, 0.0), (0.3, 0.7, 0.5, 0.25), (0, 0.9, 0.4, 0)])
def test_invardiff_gives_the_booleans_of_the_method(model, stats, features, phase2, step, attn, ff, nonskip):
    taus = {"hidden": step, "attn": attn, "ff": ff}
    wanted = invardiff_by_hand(features, 3, taus, nonskip, phase2)
    plan = sg.make_plan(
        "invardiff", stats, model=model, scheduler=tiny_scheduler("ddim"), step=step, attn=attn, ff=ff, nonskip=nonskip,
        phase2=phase2,
    )  # fmt: skip
    for s in range(STEPS):
        for name, hits in wanted.items():
            dead = name != "hidden" and wanted["hidden"][s]
            assert plan.action(s, name).value == ("." if dead else "R" if hits[s] else "C"), (s, name)
    assert any(any(hits) for hits in wanted.values())


def test_phase_2_moves_hits_and_keeps_their_number(model, stats):
    taus = {"step": 0.0, "attn": 0.6, "ff": 0.6}
    plans = [
        sg.make_plan("invardiff", stats, model=model, scheduler=tiny_scheduler("ddim"), phase2=phase2, **taus)
        for phase2 in (False, True)
    ]
    reused = [sum(row.count("R") for row in plan.rows) for plan in plans]
    assert reused[0] == reused[1] > 0
    assert plans[0].rows != plans[1].rows


def test_what_is_given_beside_statistics_must_fit_them(model, stats):
    for given, said in [
        ({"model": tiny_dit(seed=3, num_layers=3)}, "other weights"),
        ({"steps": 50}, f"of {STEPS} steps, asked for are 50"),
        ({"scheduler": tiny_scheduler("euler")}, "compiled for DDIMScheduler, but the given scheduler has Euler"),
    ]:
        with pytest.raises(PlanError, match=said):
            sg.make_plan("interval", stats, **given)


def test_a_lower_threshold_reuses_less(stats):
    reused = [
        sum(row.count("R") for row in sg.make_plan("invardiff", stats, step=0.0, attn=tau, ff=tau, phase2=False).rows)
        for tau in (0.1, 0.3, 0.6, 0.9)
    ]
    assert reused == sorted(reused)
    assert reused[0] < reused[-1]
    # Quantiles of 10 x 3 distinct rates per kind: the share of hits follows from tau.
    assert reused == [2 * sum(rank < tau * 29 for rank in range(30)) for tau in (0.1, 0.3, 0.6, 0.9)]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"threshold": 0.24, "max_skip": 5, "retention": 0.1, "exclude": [11]}, "...##.###.#.#####.#####.##.#"),
        ({"threshold": 0.06, "max_skip": 3, "retention": 0.2}, "......#.#.###.###.###.##.#.."),
    ],
)
def test_magcache_gives_both_published_flux_patterns(model, arguments, pattern):
    ratios = FLUX_MAG_RATIOS.tolist()
    plan = sg.make_plan("magcache", model=model, scheduler=tiny_scheduler("ddim"), steps=28, ratios=ratios, **arguments)
    column = "".join(row[plan.index("stack_residual")] for row in plan.rows)
    assert column.replace("C", ".").replace("R", "#") == pattern


def test_magnitude_ratios_are_means_over_tokens(stats, features):
    column = [site.name for site in stats.sites].index("stack_residual")
    for s in range(1, STEPS):
        norms = [np.linalg.norm(run[s]["stack_residual"], axis=-1) for run in features]
        before = [np.linalg.norm(run[s - 1]["stack_residual"], axis=-1) for run in features]
        wanted = np.mean([(a / b).mean() for a, b in zip(norms, before, strict=True)])
        assert stats.ratio[s, column].item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.2, 0.6, 10.0])
def test_smoothcache_skips_the_longest_stretch_that_fits(stats, features, alpha, per_layer):
    plan = sg.make_plan("smoothcache", stats, alpha=alpha, per_layer=per_layer)

    def error(names, s, k):
        of = [np.mean([np.abs(run[s][n] - run[s - k][n]).sum() / np.abs(run[s][n]).sum() for run in features]) for n in names]
        return np.mean(of)

    for module in ("attn1", "ff"):
        names = [f"transformer_blocks.{i}.{module}" for i in range(3)]
        for group in [[n] for n in names] if per_layer else [names]:
            s, computed = 0, set()
            while s < STEPS:
                computed.add(s)
                longest = 0
                for k in (1, 2, 3):
                    if s + k < STEPS - 1 and error(group, s + k, k) <= alpha:
                        longest = k
                s += longest + 1
            assert STEPS - 1 in computed
            for n in group:
                assert {s for s in range(STEPS) if plan.action(s, n).value == "C"} == computed


@pytest.mark.parametrize("policy", ["invardiff", "smoothcache", "magcache"])
def test_a_calibrated_plan_runs_as_the_oracle_says(model, stats, policy):
    arguments = {"invardiff": {"phase2": False}, "smoothcache": {"alpha": 0.3}, "magcache": {"threshold": 0.5}}[policy]
    plan = sg.make_plan(policy, stats, **arguments)
    assert any("R" in row for row in plan.rows)
    assert sg.CachePlan.from_json(plan.to_json()) == plan
    given = {"class_labels": torch.tensor([3])}
    wanted, _ = run_loop(Oracle.of(model, plan), tiny_scheduler("ddim"), noise(), STEPS, 1.0, given)
    exe = sg.compile(model, plan, sg.example_inputs(model), backend="eager", exact=True)
    assert torch.equal(sg.sample(exe, tiny_scheduler("ddim"), noise(), **given), wanted)


@pytest.mark.parametrize(
    ("policy", "arguments", "said"),
    [
        ("invardiff", {"step": 1.5}, "step is 1.5; expected a number in 0..1"),
        ("invardiff", {"metric": "v9"}, "unknown metric 'v9'; these statistics have v1, relative_l1, lagged"),
        ("invardiff", {"metric": "lagged", "phase2": True}, "it is true or false, and holds references"),
        ("invardiff", {}, "pass model= and scheduler=, or phase2=False"),
        ("invardiff", {"again": None}, "no argument 'again'"),
        ("smoothcache", {"alpha": -1}, "alpha is -1 for attn"),
        ("smoothcache", {"alpha": {"mlp": 0.1}}, "alpha is given for 'mlp'; this model has the module kinds attn, ff"),
        ("magcache", {"ratios": [1.0]}, f"ratios holds 1 numbers; expected {STEPS}"),
        ("magcache", {"threshold": "abc"}, "threshold is 'abc'"),
        ("magcache", {"exclude": 3}, "exclude 3; expected"),
        ("magcache", {"retention": 2}, "retention 2; expected"),
    ],
)
def test_arguments_out_of_range_are_refused(stats, policy, arguments, said):
    with pytest.raises(PlanError, match=said):
        sg.make_plan(policy, stats, **arguments)


def test_what_needs_calibration_says_so(model):
    for policy in ("invardiff", "smoothcache", "magcache"):
        with pytest.raises(PlanError, match=r"needs calibration .*stepgraph\.calibrate|needs calibration; pass stats"):
            sg.make_plan(policy, model=model, scheduler=tiny_scheduler("ddim"), steps=4)


def test_every_policy_names_its_source_and_its_arguments_fit_into_a_plan(stats):
    for policy in POLICIES.values():
        assert policy.source
    plan = sg.make_plan("invardiff", stats, step=0.5, phase2=False)
    recorded = json.loads(plan.to_json())["arguments"]
    assert recorded == {
        "step": 0.5, "attn": 0.2, "ff": 0.2, "context_ff": None, "single_attn": None, "single_mlp": None, "nonskip": 0.0,
        "protect": "both", "metric": "v1", "phase2": False, "variant": "auto",
    }  # fmt: skip
