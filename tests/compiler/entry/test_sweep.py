"""Sweeps: what is measured, the knee, and the baseline."""

import json
import math

import pytest
import torch
from PIL import Image

import stepgraph as sg
from helpers.distance import SAME_RUN
from helpers.oracle import run_loop
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_scheduler
from stepgraph.compiler.planning.sweep_result import find_knee, pareto_front
from stepgraph.errors import PlanError

STEPS, SAMPLES = 6, 3


@pytest.fixture(scope="module")
def swept(dit):
    seen = []
    result = sg.sweep(
        "interval", model=dit, scheduler=tiny_scheduler("ddim"), knob="every", values=[1, 2, 3, 3, 4], steps=STEPS,
        samples=SAMPLES, guidance_scale=2.0, batch=2, arguments={"kinds": ["ff"]}, on_step=lambda *p: seen.append(p),
    )  # fmt: skip
    return result, seen


def eager(dit, steps: int) -> torch.Tensor:
    """The independent loop, one batch."""
    null = {"class_labels": torch.full((SAMPLES,), NULL_CLASS)}
    return run_loop(dit, tiny_scheduler("ddim"), noise(SAMPLES), steps, 2.0, labels(*range(SAMPLES)), null)[0]


def mean_error(value: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    errors = [float((v - r).norm() / r.norm()) for v, r in zip(value.double(), reference.double(), strict=True)]
    mean = sum(errors) / len(errors)
    return mean, (sum((e - mean) ** 2 for e in errors) / (len(errors) - 1) / len(errors)) ** 0.5


def test_every_point_is_what_its_plan_gives(dit, swept):
    result, _ = swept
    assert [point.value for point in result.points] == [1, 2, 3, 4]
    reference = eager(dit, STEPS)
    for point in result.points:
        arguments = {"every": point.value, "kinds": ["ff"]}
        plan = sg.make_plan("interval", model=dit, scheduler=tiny_scheduler("ddim"), steps=STEPS, **arguments)
        assert point.plan == plan
        exe = sg.compile(dit, plan, inputs(2 * SAMPLES), backend="eager", exact=True)
        null = torch.full((SAMPLES,), NULL_CLASS)
        images = sg.sample(
            exe, tiny_scheduler("ddim"), noise(SAMPLES), 2.0, **labels(*range(SAMPLES)), negative_class_labels=null
        )
        error, spread = mean_error(images, reference)
        # Batches of two and one against one of three, and fused operations against the eager ones.
        assert point.error == pytest.approx(error, rel=1e-4, abs=1e-5)
        assert point.standard_error == pytest.approx(spread, rel=1e-3, abs=1e-5)
        # Both halves of the guidance belong to an image.
        assert point.macs == exe.macs().computed / SAMPLES
    assert result.macs_full == exe.macs().total / SAMPLES
    assert result.points[0].error < SAME_RUN < result.points[1].error


def test_the_baseline_is_the_sampler_in_fewer_steps(dit, swept):
    result, _ = swept
    reference = eager(dit, STEPS)
    shares = [STEPS * point.macs / result.macs_full for point in result.points[1:]]
    wanted = {bound for share in shares for bound in (math.floor(share), math.ceil(share)) if bound < STEPS}
    assert [fewer.steps for fewer in result.baseline] == sorted(wanted, reverse=True)
    for fewer in result.baseline:
        assert fewer.error == pytest.approx(mean_error(eager(dit, fewer.steps), reference)[0], rel=1e-4)
        assert fewer.macs == result.macs_full * fewer.steps / STEPS
        assert result.fewer_steps_error(fewer.macs) == pytest.approx(fewer.error)
    low, high = result.baseline[-1], result.baseline[-2] if len(result.baseline) > 1 else None
    assert result.fewer_steps_error(low.macs - 1) is None
    assert result.fewer_steps_error(result.macs_full) == 0
    if high is not None:
        assert result.fewer_steps_error((low.macs + high.macs) / 2) == pytest.approx(math.sqrt(low.error * high.error))


def test_progress_reaches_its_end_and_the_record_is_plain_data(swept, tmp_path):
    result, seen = swept
    done, totals = [p[1] for p in seen], {p[2] for p in seen}
    assert done == sorted(done)
    assert totals == {done[-1]}
    assert {"full compute", "every = 2"} <= {p[0] for p in seen}
    facts = json.loads(json.dumps(result.as_dict()))
    assert [point["value"] for point in facts["points"]] == [1, 2, 3, 4]
    assert facts["points"][0]["fewer_macs"] == 1
    assert (facts["policy"], facts["knobs"], facts["samples"]) == ("interval", ["every"], SAMPLES)
    result.plot(tmp_path / "sweep.png")
    assert Image.open(tmp_path / "sweep.png").size[0] > 500


def test_several_knobs_take_one_value_and_equal_plans_run_once(dit):
    ratios = [1.0] + [0.9] * (STEPS - 1)
    names = set()
    result = sg.sweep(
        "magcache", model=dit, scheduler=tiny_scheduler("ddim"), knob=["threshold", "retention"], values=[0.0, 0.5, 1.0],
        steps=STEPS, samples=1, arguments={"ratios": ratios}, on_step=lambda name, done, total: names.add(name),
    )  # fmt: skip
    assert [dict(p.plan.header.arguments)["retention"] for p in result.points] == [0.0, 0.5, 1.0]
    # The first and the last value skip nothing.
    assert result.points[0].plan.rows == result.points[2].plan.rows
    assert (result.points[0].error, result.points[0].standard_error) == (result.points[2].error, 0.0)
    assert "threshold, retention = 1.0" not in names


POINTS = {
    # Halving the error costs little up to the middle point, and much behind it.
    "an elbow": ([(1, 1.0), (2, 0.1), (10, 0.05)], 1),
    "the order does not matter": ([(10, 0.05), (1, 1.0), (2, 0.1)], 2),
    "beaten points do not count": ([(1, 1.0), (2, 0.1), (3, 0.2), (10, 0.05), (10, 0.9)], 1),
    "full compute does not count": ([(1, 1.0), (2, 0.1), (10, 0.05), (20, 0.0)], 1),
    "a straight line": ([(1, 1.0), (2, 0.1), (3, 0.01)], None),
    "above the chord": ([(1, 1.0), (9, 0.9), (10, 0.05)], None),
    "two points": ([(1, 1.0), (2, 0.1)], None),
    "one point": ([(1, 1.0)], None),
    "equal points": ([(1, 0.5)] * 5, None),
    "equal MACs": ([(1, 0.5), (1, 0.4), (1, 0.3)], None),
    "nothing but full compute": ([(1, 0.0)] * 3, None),
    "not finite": ([(1, math.nan), (1, math.inf), (2, 0.1), (3, 0.05)], None),
    "none": ([], None),
}


@pytest.mark.parametrize("case", POINTS)
def test_the_knee(case):
    points, wanted = POINTS[case]
    assert find_knee(points) == wanted


def test_the_knee_is_farthest_from_the_chord_in_the_scaled_plane():
    points = [(macs, math.exp(-((macs / 3) ** 0.4)) * 0.5) for macs in range(1, 30)]
    x = torch.tensor([float(macs) for macs, _ in points])
    y = torch.tensor([error for _, error in points]).log()
    x, y = (x - x.min()) / (x.max() - x.min()), (y - y.min()) / (y.max() - y.min())
    start, chord = torch.stack([x[0], y[0]]), torch.stack([x[-1] - x[0], y[-1] - y[0]])
    distances = [abs(float(chord[0] * (b - start[1]) - chord[1] * (a - start[0]))) for a, b in zip(x, y, strict=True)]
    assert find_knee(points) == max(range(len(points)), key=distances.__getitem__)
    assert pareto_front(points) == list(range(len(points)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": []}, "nothing to sweep: 1 knobs and 0 values"),
        ({"knob": []}, "nothing to sweep: 0 knobs"),
        ({"knob": "evry"}, "the policy 'interval' has no argument 'evry'"),
        ({"arguments": {"every": 3}}, "'every' is swept and given as 3 as well"),
        ({"samples": 0}, "samples is 0; expected a whole number"),
        ({"batch": 0}, "batch is 0; expected a whole number"),
        ({"values": [2, 0]}, "every is 0 for attn"),
        ({"policy": "smoothcache", "knob": "alpha"}, "needs calibration"),
        ({"steps": None}, "needs steps"),
    ],
    ids=str,
)
def test_what_cannot_be_swept_is_refused(dit, changes, message):
    given = {"policy": "interval", "knob": "every", "values": [2], "steps": 4} | changes
    with pytest.raises(PlanError, match=message):
        sg.sweep(given.pop("policy"), model=dit, scheduler=tiny_scheduler("ddim"), **given)
