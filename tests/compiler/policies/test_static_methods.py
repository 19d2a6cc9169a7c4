"""The published static methods, each derived once more by a plain loop that shares nothing with the policy."""

import json

import numpy as np
import pytest
import torch
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

import stepgraph as sg
from helpers.oracle import Oracle, run_loop
from helpers.tiny import noise, tiny_dit, tiny_scheduler
from helpers.watched import watched_values
from stepgraph.compiler.policies import POLICIES
from stepgraph.errors import PlanError

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


def v1(new, current, previous):
    return distance(new, current) / distance(current, previous)


def lagged(new, current, previous):
    return np.abs(current - previous).sum() / np.abs(current).sum()


def rates(features, name, provisional=None, rate=v1):
    """InvarDiff's rates of one site, [T]; with provisional hits, its resampling correction."""
    table = np.zeros((len(features), STEPS))
    for row, run in zip(table, features, strict=True):
        z = [step[name] for step in run]
        previous, current, frozen = z[0], z[1], False
        for s in range(2, STEPS):
            row[s - 1] = rate(z[s], current, previous)
            if provisional is None or not provisional[s - 1]:
                previous, current, frozen = current, z[s], False
            elif not frozen:
                previous, current, frozen = current, z[s], True
        if rate is lagged:
            row[STEPS - 1] = lagged(None, z[STEPS - 1], z[STEPS - 2])
    mean = table.mean(axis=0)
    mean[0] = 0.0 if rate is lagged else 1.0
    mean[-1] = mean[-1] if rate is lagged else 1.0
    return mean


def invardiff_by_hand(features, blocks, taus, nonskip=0.0, phase2=False, protect="both", rate=v1, variant="dit"):
    """The booleans of the method for a DiT: step gate [T], and modules [T][blocks] by kind."""
    names = {"attn": [f"transformer_blocks.{i}.attn1" for i in range(blocks)]}
    names |= {"ff": [f"transformer_blocks.{i}.ff" for i in range(blocks)], "hidden": ["hidden"]}
    rows = max(1, int(nonskip * STEPS)) if protect != "none" else 1
    end = STEPS - 1 if protect == "both" else STEPS

    def decide(provisional, rows=rows):
        hits = {}
        for kind, own in names.items():
            table = np.stack([rates(features, n, provisional and provisional[n], rate) for n in own], axis=1)
            limit = np.quantile(table[1:-1].ravel(), taus[kind])
            for column, n in enumerate(own):
                hits[n] = [rows <= s < end and table[s, column] < limit for s in range(STEPS)]
        return hits

    hits = decide(None)
    if phase2 and variant == "dit":
        hits = decide(hits)
    elif phase2:
        # FLUX's code: phase 2 starts from a plan that protects row 0 alone at the front, and leaves the step gate as it was.
        hits = decide(decide(None, rows=1)) | {"hidden": hits["hidden"]}
    for s in range(STEPS):
        if hits["hidden"][s]:
            for n in names["attn"] + names["ff"]:
                hits[n][s] = True
                if s + 1 < STEPS:
                    hits[n][s + 1] = False
    return hits


def assert_same_booleans(plan, wanted):
    for s in range(STEPS):
        for name, hits in wanted.items():
            dead = name != "hidden" and wanted["hidden"][s]
            assert plan.action(s, name).value == ("." if dead else "R" if hits[s] else "C"), (s, name)
    assert any(any(hits) for hits in wanted.values())


@pytest.mark.parametrize("phase2", [False, True])
@pytest.mark.parametrize(("step", "attn", "ff", "nonskip"), [(0.61, 0.2, 0.2, 0.0), (0.3, 0.7, 0.5, 0.25), (0, 0.9, 0.4, 0)])
def test_invardiff_gives_the_booleans_of_the_method(model, stats, features, phase2, step, attn, ff, nonskip):
    taus = {"hidden": step, "attn": attn, "ff": ff}
    wanted = invardiff_by_hand(features, 3, taus, nonskip, phase2)
    plan = sg.make_plan(
        "invardiff", stats, model=model, scheduler=tiny_scheduler("ddim"), step=step, attn=attn, ff=ff, nonskip=nonskip,
        phase2=phase2,
    )  # fmt: skip
    assert_same_booleans(plan, wanted)


@pytest.mark.parametrize("protect", ["both", "first", "none"])
@pytest.mark.parametrize("metric", ["v1", "lagged", "relative_l1"])
def test_invardiff_with_other_boundaries_and_metrics(stats, features, protect, metric):
    # Among the tested values nothing vanishes, so that the later form of the rate is the paper's up to fp32 rounding.
    rate = lagged if metric == "lagged" else v1
    taus = {"hidden": 0.4, "attn": 0.85, "ff": 0.7}
    nonskip = 0.0 if protect == "none" else 0.3
    wanted = invardiff_by_hand(features, 3, taus, nonskip=nonskip, protect=protect, rate=rate)
    plan = sg.make_plan(
        "invardiff", stats, step=0.4, attn=0.85, ff=0.7, nonskip=nonskip, protect=protect, metric=metric, phase2=False
    )
    assert_same_booleans(plan, wanted)
    first = [
        next(s for s in range(STEPS) if row[s] != "C") for row in map("".join, zip(*plan.rows, strict=True)) if set(row) > {"C"}
    ]
    assert min(first) >= (1 if protect == "none" else 3)


def test_invardiff_as_flux_corrects_modules_only(model, stats, features):
    taus = {"hidden": 0.5, "attn": 0.6, "ff": 0.6}
    given = {"step": 0.5, "attn": 0.6, "ff": 0.6, "nonskip": 0.3, "phase2": True}
    plans = {}
    for variant in ("dit", "flux", "auto"):
        plans[variant] = sg.make_plan(
            "invardiff", stats, model=model, scheduler=tiny_scheduler("ddim"), variant=variant, **given
        )
        as_code = "dit" if variant == "auto" else variant
        assert_same_booleans(plans[variant], invardiff_by_hand(features, 3, taus, 0.3, True, variant=as_code))
    assert plans["dit"].rows == plans["auto"].rows != plans["flux"].rows
    gate = plans["flux"].index("hidden")
    before = sg.make_plan("invardiff", stats, **given | {"phase2": False})
    assert [row[gate] for row in plans["flux"].rows] == [row[gate] for row in before.rows]


def test_invardiff_with_a_metric_of_ones_own(model, features):
    def cubed(new, current, previous):
        return ((new - current).double() ** 3).abs().flatten(2).sum(-1)

    stats = sg.calibrate(
        model, tiny_scheduler("ddim"), steps=STEPS, samples=SAMPLES, seed=SEED, metrics={"cubed": cubed}, channels=False
    )
    taus = {"hidden": 0.3, "attn": 0.5, "ff": 0.5}
    wanted = invardiff_by_hand(features, 3, taus, rate=lambda new, current, previous: (np.abs(new - current) ** 3).sum())
    given = {"step": 0.3, "attn": 0.5, "ff": 0.5, "metric": "cubed"}
    # The method has no such rate at the ends; there it counts as 1.
    assert_same_booleans(sg.make_plan("invardiff", stats, phase2=False, **given), wanted)
    corrected = sg.make_plan(
        "invardiff", stats, model=model, scheduler=tiny_scheduler("ddim"), metrics={"cubed": cubed}, **given
    )
    assert corrected.header.arguments["metric"] == "cubed"


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


@pytest.mark.parametrize("coefficients", [None, [1.0, 0.0], [-3.0, 2.0, 0.5, 0.01]])
@pytest.mark.parametrize(("threshold", "first", "last"), [(0.3, 1, 1), (0.8, 3, 2), (0.0, 1, 0), (1e9, 1, 0)])
def test_teacache_accumulates_what_the_embedding_predicts(model, stats, features, coefficients, threshold, first, last):
    scheduler = tiny_scheduler("ddim")
    scheduler.set_timesteps(STEPS)
    embed = model.transformer_blocks[0].norm1.emb
    with torch.no_grad():
        e = [embed.timestep_embedder(embed.time_proj(t.reshape(1))).double().numpy() for t in scheduler.timesteps]
    x = [0.0] + [np.abs(b - a).sum() / np.abs(a).sum() for a, b in zip(e, e[1:], strict=False)]
    powers = coefficients
    if powers is None:
        outputs = [[step["output"] for step in run] for run in features]
        size = [np.mean([np.abs(run[s]).mean() for run in outputs]) for s in range(STEPS)]
        moved = [np.mean([np.abs(run[s] - run[s - 1]).mean() for run in outputs]) / size[s - 1] for s in range(1, STEPS)]
        powers = np.polyfit(x[1:], moved, 4)
    total, wanted = 0.0, ""
    for s in range(STEPS):
        total += np.polyval(powers, x[s])
        skip = first <= s < STEPS - last and total < threshold
        wanted += "R" if skip else "C"
        total = total if skip else 0.0
    plan = sg.make_plan("teacache", stats, threshold=threshold, coefficients=coefficients, first=first, last=last)
    assert "".join(row[plan.index("stack_residual")] for row in plan.rows) == wanted


def columns_of(plan, letter="R"):
    """Names of the sites that are ever reused, with their letters over time."""
    columns = {site.name: "".join(row[i] for row in plan.rows) for i, site in enumerate(plan.sites)}
    return {name: column for name, column in columns.items() if letter in column}


def test_deepcache_reuses_a_range_of_blocks(model, stats):
    plan = sg.make_plan("deepcache", stats, every=3, first=1, last=2)
    assert columns_of(plan) == {f"transformer_blocks.1.{name}": "CRR" * 4 for name in ("attn1", "ff")}
    assert columns_of(sg.make_plan("deepcache", stats)).keys() == {"transformer_blocks.1.attn1", "transformer_blocks.1.ff"}
    assert len(columns_of(sg.make_plan("deepcache", stats, first=0, last=3))) == 6
    output = sg.make_plan("deepcache", stats, every=2, first=0, last=2, reuse="output")
    assert columns_of(output) == {"transformer_blocks.1": "CR" * 6}
    assert output.rows[1].count(".") == 5
    # The schedule of the paper: dense around the center. T = 12, N = 3: x = -2 + (sqrt(8) + 2) i / 4, squared with its sign.
    dense = sg.make_plan("deepcache", stats, every=3, power=2.0, center=4)
    step = (8**0.5 + 2) / 4
    full = {0} | {int(np.sign(x) * x * x) + 4 for x in (-2 + i * step for i in range(4))}
    assert columns_of(dense)["transformer_blocks.1.ff"] == "".join("C" if s in full else "R" for s in range(STEPS))


def test_procache_takes_the_best_of_its_monotone_schedules(stats, features):
    for budget, shortest, longest in ((4, 1, 5), (5, 2, 4), (12, 1, 1), (6, 2, 2)):
        plan = sg.make_plan("procache", stats, budget=budget, shortest=shortest, longest=longest, candidates=8)
        letters = "".join(row[plan.index("transformer_blocks.0.ff")] for row in plan.rows)
        lengths = [len(part) + 1 for part in letters.split("C")[1:]]
        assert len(lengths) == budget
        assert sum(lengths) == STEPS
        assert lengths == sorted(lengths, reverse=True)
        assert all(shortest <= length <= longest for length in lengths)
        assert set(columns_of(plan).values()) <= {letters}

    def predicted(plan):
        """Relative L2 distance to the value that is used, over modules and reused steps."""
        letters = "".join(row[plan.index("transformer_blocks.0.ff")] for row in plan.rows)
        names = [f"transformer_blocks.{i}.{module}" for i in range(3) for module in ("attn1", "ff")]
        total, last = 0.0, 0
        for s, letter in enumerate(letters):
            last = s if letter == "C" else last
            for name in names:
                squares = np.mean([((run[s][name] - run[last][name]) ** 2).mean() for run in features])
                sizes = [
                    np.mean([np.linalg.norm(run[t][name]) for run in features]) ** 2 / run[t][name].size
                    for t in (s, last)
                    for run in features[:1]
                ]
                total += (squares / np.mean(sizes)) ** 0.5
        return total

    one = [sg.make_plan("procache", stats, budget=4, candidates=1, seed=seed) for seed in range(3)]
    assert len({plan.rows for plan in one}) > 1
    for seed, plan in enumerate(one):
        best = sg.make_plan("procache", stats, budget=4, candidates=20, seed=seed)
        assert predicted(best) <= predicted(plan) + 1e-9


@pytest.mark.parametrize("policy", ["invardiff", "smoothcache", "magcache", "teacache", "deepcache", "procache"])
def test_a_calibrated_plan_runs_as_the_oracle_says(model, stats, policy):
    arguments = {"invardiff": {"phase2": False}, "smoothcache": {"alpha": 0.3}, "magcache": {"threshold": 0.5}}
    arguments |= {"teacache": {"threshold": 0.6}, "deepcache": {}, "procache": {}}
    plan = sg.make_plan(policy, stats, **arguments[policy])
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
        ("invardiff", {"metric": "v9"}, "unknown metric 'v9'; these statistics have lagged, relative_l1, v1"),
        ("invardiff", {"metric": "lagged", "phase2": True}, "it is true or false, and holds references"),
        ("invardiff", {}, "pass model= and scheduler=, or phase2=False"),
        ("invardiff", {"again": None}, "no argument 'again'"),
        ("invardiff", {"protect": "last"}, "protect is 'last'; expected one of both, first, none"),
        ("invardiff", {"variant": "sd3"}, "variant is 'sd3'; expected one of auto, dit, flux"),
        ("invardiff", {"context_ff": 0.5}, "context_ff is 0.5, but this model has no such modules; it has attn, ff, hidden"),
        ("invardiff", {"nonskip": -0.1}, "nonskip is -0.1; expected a number in 0..1"),
        ("teacache", {"threshold": -1}, "threshold is -1; expected a number of at least 0"),
        ("teacache", {"coefficients": "abc"}, "coefficients is 'abc'; expected a list of numbers"),
        ("teacache", {"coefficients": []}, "coefficients is .*expected a list of numbers"),
        ("teacache", {"degree": 9}, r"degree is 9; expected a whole number in 0\.\.8"),
        ("teacache", {"first": 0}, rf"first is 0; expected a whole number in 1\.\.{STEPS}"),
        ("deepcache", {"every": 0}, "every is 0; expected a whole number of at least 1"),
        ("deepcache", {"first": 3}, r"first is 3 of 3 blocks; expected a whole number in 0\.\.2"),
        ("deepcache", {"first": 2, "last": 2}, r"last is 2 of 3 blocks; expected a whole number in 3\.\.3"),
        ("deepcache", {"reuse": "output"}, "reuse='output' needs first=0 and block sites; first is 1"),
        ("deepcache", {"reuse": "nose"}, "reuse is 'nose'; expected one of modules, output"),
        ("deepcache", {"power": 0.5}, "power is 0.5; expected a number of at least 1"),
        ("deepcache", {"center": 3}, "center is 3, but it shapes the non-uniform schedule only"),
        ("procache", {"budget": 1}, rf"1 segments of 1\.\.5 steps hold 1\.\.5 steps, and this schedule has {STEPS}"),
        ("procache", {"candidates": 0}, "candidates is 0; expected a whole number of at least 1"),
        ("procache", {"kinds": ["nose"]}, "unknown kind 'nose'; this model has attn, ff"),
        ("smoothcache", {"alpha": -1}, "alpha is -1 for attn"),
        ("smoothcache", {"alpha": {"mlp": 0.1}}, "alpha is given for 'mlp'; this model has the module kinds attn, ff"),
        ("magcache", {"ratios": [1.0]}, f"ratios holds 1 numbers; expected {STEPS}"),
        ("magcache", {"threshold": "abc"}, "threshold is 'abc'"),
        ("magcache", {"exclude": 3}, "exclude is 3; expected a list of steps"),
        ("magcache", {"exclude": "3"}, "exclude is '3'; expected a list of steps"),
        ("magcache", {"exclude": ["a"]}, r"exclude\[0\] is 'a'; expected a whole number in 0"),
        ("magcache", {"exclude": [99]}, rf"exclude\[0\] is 99; expected a whole number in 0\.\.{STEPS - 1}"),
        ("magcache", {"retention": 2}, r"retention is 2; expected a number in 0\.\.1"),
        ("magcache", {"retention": True}, "retention is True; expected a number"),
        ("magcache", {"max_skip": True}, "max_skip is True; expected a whole number of at least 0"),
        ("magcache", {"ratios": 5}, "ratios is 5; expected a list of numbers"),
        ("magcache", {"ratios": [float("nan")] * STEPS}, r"ratios\[0\] is nan; expected a number"),
        ("invardiff", {"protect": "none", "nonskip": 0.5}, "nonskip is 0.5, but protect='none' computes step 0 only"),
        ("teacache", {"coefficients": [float("nan")]}, r"coefficients\[0\] is nan; expected a number"),
        ("interval", {"kinds": 5}, "kinds is 5; expected a list"),
        ("procache", {"kinds": 5}, "kinds is 5; expected a list"),
        ("procache", {"kinds": []}, r"kinds is \[\]; expected at least one kind"),
        ("procache", {"seed": "x"}, "seed is 'x'; expected a whole number"),
        ("smoothcache", {"per_layer": "no"}, "per_layer is 'no'; expected True or False"),
        ("l2c", {"router": 5}, "router is 5; expected the name of a file"),
    ],
)
def test_arguments_out_of_range_are_refused(stats, policy, arguments, said):
    with pytest.raises(PlanError, match=said):
        sg.make_plan(policy, stats, **arguments)


def test_what_needs_calibration_says_so(model):
    for policy in ("invardiff", "smoothcache", "magcache", "teacache", "procache"):
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
