"""Resampling plans to another number of steps."""

import warnings
from fractions import Fraction

import diffusers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stepgraph as sg
from helpers.example_plans import HEADER, SITES
from helpers.tiny import inputs, labels, noise, tiny_scheduler
from stepgraph.errors import PlanError
from stepgraph.plan import CachePlan
from stepgraph.plan.resample import resampled_letters

NAMES = [site.name for site in SITES]


def plan_of(steps: int, **actions) -> CachePlan:
    header = HEADER.__class__(
        **{**HEADER.__dict__, "steps": steps, "timesteps": tuple(1000.0 - s for s in range(steps)), "arguments": {}}
    )
    return CachePlan.build(header, SITES, actions)


def resampled(plan: CachePlan, *arguments) -> CachePlan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return plan.resample(*arguments)


def column(plan: CachePlan, name: str) -> str:
    return "".join(row[plan.index(name)] for row in plan.rows)


@st.composite
def plans(draw) -> CachePlan:
    """Any valid plan of the toy model: every site computes first, then does what its kind can."""
    steps = draw(st.integers(1, 24))
    actions = {}
    for site in SITES:
        letters = "CR" if site.kind in ("block", "stack_residual", "hidden", "output") else "CRLF"
        if draw(st.booleans()):
            actions[site.name] = "C" + "".join(draw(st.lists(st.sampled_from(letters), min_size=steps - 1, max_size=steps - 1)))
    return plan_of(steps, **actions)


@settings(max_examples=150)
@given(plan=plans(), steps=st.integers(1, 60))
def test_every_site_computes_the_same_share_to_within_one_row(plan, steps):
    # Construction validates the plan: what is stored before it is read, DEAD where and only where it must be.
    found = resampled(plan, steps)
    assert (found.steps, found.header.steps, found.sites) == (steps, steps, plan.sites)
    for name in NAMES:
        computed, before = column(found, name).count("C"), column(plan, name).count("C")
        # A site computes its first row, however small its share is.
        assert abs(computed - Fraction(before * steps, plan.steps)) < 1, name


@settings(max_examples=60)
@given(plan=plans())
def test_the_same_number_of_steps_gives_the_same_rows(plan):
    found = plan.resample(plan.steps)
    assert found.rows == plan.rows
    assert found.header == plan.header


@settings(max_examples=60)
@given(plan=plans(), steps=st.integers(1, 60))
def test_sites_with_equal_columns_keep_equal_columns_and_no_action_is_new(plan, steps):
    found = resampled(plan, steps)
    for a in NAMES:
        assert set(column(found, a)) <= set(column(plan, a)) | {"."}
        for b in NAMES:
            if column(plan, a) == column(plan, b):
                assert column(found, a) == column(found, b)


@settings(max_examples=100)
@given(data=st.data(), length=st.integers(1, 80))
def test_computed_rows_stay_where_they_were_in_the_run(data, length):
    """The q-th computed row lies between the old plan's two that it stands for, to within two rows."""
    old = "C" + "".join(data.draw(st.lists(st.sampled_from("CR"), max_size=40)))
    computed = max(1, round(old.count("C") / len(old) * length))
    new = resampled_letters(old, length, computed)
    assert (len(new), new.count("C"), new[0]) == (length, computed, "C")
    if old[-1] == "C" and computed > 1:
        assert new[-1] == "C"
    events = [s / len(old) for s, letter in enumerate(old) if letter == "C"] + [1.0]
    for q, place in enumerate(s for s, letter in enumerate(new) if letter == "C"):
        index = q * (len(events) - 1) / computed
        low, high = events[int(index)], events[min(int(index) + 1, len(events) - 1)]
        assert low - 2 / length <= place / length <= high + 2 / length


PERIODS = [
    ("CR" * 10, 40, "CR" * 20),
    ("CR" * 10, 10, "CR" * 5),
    ("CRR" * 6, 36, "CRR" * 12),
    ("CRR" * 6, 9, "CRR" * 3),
    ("CRRRR" * 5, 50, "CRRRR" * 10),
    ("C" * 20, 7, "C" * 7),
    ("C" + "R" * 9, 30, "CRRRRRRRRRCRRRRRRRRRCRRRRRRRRR"),
    ("C" + "R" * 19, 5, "CRRRR"),
    # The first and the last step compute where they did.
    ("CRRRRRRC", 4, "C"),
    ("CCRRRRCC", 4, "CRRC"),
]


@pytest.mark.parametrize(("old", "steps", "wanted"), PERIODS, ids=str)
def test_periods_and_ends_are_kept(old, steps, wanted):
    wanted = wanted if len(wanted) == steps else wanted.ljust(steps, "R")
    assert column(resampled(plan_of(len(old), ff=old), steps), "blocks.0.ff") == wanted


def test_a_whole_step_pattern_resamples_with_everything_inside_it():
    found = resampled(plan_of(12, hidden="CRRRCRRCRRCR", attn="CCCCRRRRCRRR"), 6)
    hidden, attn = column(found, "hidden"), column(found, "blocks.1.attn#1")
    assert (hidden[0], hidden.count("C")) == ("C", 2)
    assert [letter == "." for letter in attn] == [letter == "R" for letter in hidden]
    assert column(found, "output") == "C" * 6


@pytest.mark.parametrize("steps", [15, 17, 30, 47, 90])
def test_modules_are_refreshed_after_a_reused_step_where_they_were(steps):
    hidden, attn = "CCRRCRRRRCCCRRCCCRRCCCCC", "CCCCCCCCCCRRCCCRRCCCRCRC"
    plan = plan_of(24, hidden=hidden, attn=attn, ff=attn.replace("CRR", "CCR"))
    for name in ("blocks.0.attn", "blocks.1.ff:1"):
        letters, before = column(resampled(plan, steps), name), column(plan, name)
        assert ".R" not in letters
        assert ".C" in letters
        assert abs(letters.count("C") - before.count("C") * steps / 24) < 1


def test_the_nearest_other_action_is_taken():
    plan = plan_of(8, ff="CLLLCFFF")
    assert column(resampled(plan, 16), "blocks.0.ff") == "CLLLCLLLCFFFCFFF"
    assert column(resampled(plan, 4), "blocks.0.ff") == "CLFF"


def test_the_header_keeps_its_origin_and_the_warning_says_what_is_missing():
    plan = plan_of(6, ff="CRCRCR").with_header(policy="interval", arguments={"every": 2})
    with pytest.warns(UserWarning, match=r"made for 6 steps and is resampled to 4: .*calibrate for 4 steps"):
        found = plan.resample(4)
    assert (found.header.policy, found.header.arguments) == ("interval", {"every": 2, "resampled_from": 6})
    assert found.header.timesteps == pytest.approx((1000.0, 1000 - 5 / 3, 1000 - 10 / 3, 995.0))
    # The origin is what was calibrated, not what lies between.
    assert resampled(found, 9).header.arguments["resampled_from"] == 6


def test_with_the_scheduler_the_plan_runs_and_without_it_is_refused(dit):
    scheduler = tiny_scheduler("ddim")
    plan = sg.make_plan("interval", model=dit, scheduler=scheduler, steps=8, every=2)
    found, guessed = resampled(plan, 4, scheduler), resampled(plan, 4)
    direct = sg.make_plan("interval", model=dit, scheduler=scheduler, steps=4, every=2)
    assert (found.rows, found.header.timesteps) == (direct.rows, direct.header.timesteps)
    results = [
        sg.sample(sg.compile(dit, p, inputs(1), backend="eager", exact=True), scheduler, noise(), **labels(3))
        for p in (found, direct)
    ]
    assert results[0].equal(results[1])
    # A plan that rests on no measurement takes over the scheduler's timesteps; any other is for those that it was made for.
    followed = sg.compile(dit, guessed, inputs(1), backend="eager", exact=True)
    assert sg.sample(followed, scheduler, noise(), **labels(3)).equal(results[0])
    exe = sg.compile(dit, guessed.with_header(measured="choice"), inputs(1), backend="eager", exact=True)
    with pytest.raises(PlanError, match="compiled for timestep"):
        sg.sample(exe, scheduler, noise(), **labels(3))
    assert scheduler.num_inference_steps is None


def test_heun_needs_its_scheduler(dit):
    scheduler = tiny_scheduler("heun")
    plan = sg.make_plan("interval", model=dit, scheduler=scheduler, steps=6, every=2)
    with pytest.raises(PlanError, match=r"HeunDiscreteScheduler evaluates the model 11 times in 6 steps; pass scheduler="):
        plan.resample(3)
    found = resampled(plan, 3, scheduler)
    assert (found.header.steps, found.steps) == (3, 5)
    assert found.header.arguments["resampled_from"] == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "steps is 0; expected a whole number of at least 1"),
        ((2.0,), "steps is 2.0"),
        ((True,), "steps is True"),
        ((4, diffusers.EulerDiscreteScheduler()), "the plan is for DDIMScheduler .*, the given scheduler is EulerDiscrete"),
        ((4, diffusers.DDIMScheduler(beta_end=0.03)), "the plan is for DDIMScheduler .*pass the plan's own scheduler"),
    ],
    ids=str,
)
def test_what_cannot_be_resampled_is_refused(dit, arguments, message):
    plan = sg.make_plan("full", model=dit, scheduler=tiny_scheduler("ddim"), steps=6)
    with pytest.raises(PlanError, match=message):
        plan.resample(*arguments)
