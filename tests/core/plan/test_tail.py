"""The rest of a plan: what is not stored is computed, and numbers that are for other values are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.families import random_rows
from stepgraph.errors import PlanError
from stepgraph.plan import CachePlan, Forecast, PlanHeader, Site
from stepgraph.plan.measured import rests_on_measurement

SITES = tuple(
    [Site(f"blocks.{i}.{part}", kind) for i in range(2) for part, kind in (("attn", "attn"), ("ff", "ff"))]
    + [Site("", "hidden"), Site("", "output")]
)
JOINT = (Site("a", "attn"), Site("a", "context_attn", output=1), Site("f", "ff"))


def plan(columns: dict[str, str], sites=SITES, forecasts=None) -> CachePlan:
    steps = len(next(iter(columns.values())))
    header = PlanHeader("M", "a/b", "S", "h", steps, tuple(float(steps - s) for s in range(steps)), {"x": (4,)}, "float32", 100)
    made = CachePlan.build(header, sites, columns)
    return CachePlan(made.header, sites, made.rows, forecasts or {})


def test_what_is_not_stored_is_computed_with_what_lies_inside():
    whole = plan({"hidden": "CRRC", "ff": "CRRR"})
    assert whole.rows == ("CCCCCC", "....RC", "....RC", "CRCRCC")
    tail = whole.tail(1)
    assert tail.rows == ("CCCCCC", "....RC", "CRCRCC")
    assert tail.header.timesteps == (3.0, 2.0, 1.0)
    assert (tail.header.steps, tail.header.schedule.begin) == (4, 1)
    assert whole.tail(3).rows == ("CCCCCC",)
    assert whole.tail(0) is whole
    assert whole.tail(1).tail(1).rows == whole.tail(2).rows
    assert whole.tail(1).tail(1).header == whole.tail(2).header
    assert tail.summary().kinds[0].computed == 4


def test_outputs_of_one_call_are_computed_together():
    whole = plan({"attn": "CRR", "context_attn": "CRR", "ff": "CCR"}, JOINT)
    assert whole.tail(1).rows == ("CCC", "RRR")


@given(st.data())
def test_any_tail_is_a_valid_plan_that_computes_no_less(data):
    rows = data.draw(random_rows(SITES, 6))
    whole = CachePlan(plan({"ff": "C" * 6}).header, SITES, rows)
    begin = data.draw(st.integers(1, 5))
    tail = whole.tail(begin)
    assert tail.rows[0] == "C" * len(SITES) or "R" not in tail.rows[0]
    for planned, row in zip(rows[begin:], tail.rows, strict=True):
        assert all(new in (old, "C") for old, new in zip(planned, row, strict=True))
    assert CachePlan.from_json(tail.to_json()) == tail


LINE = Forecast(("y1", "y2"), ((2.0, -1.0),))


def test_forecasts_of_what_is_not_stored_are_computed_and_of_other_values_refused():
    cells = {(3, 5): LINE, (5, 5): LINE}
    whole = plan({"output": "CRCFCF"}, forecasts=cells)
    late = whole.tail(4)
    assert [row[5] for row in late.rows] == ["C", "C"]
    assert late.forecasts == {}
    # In the whole plan nothing but steps 2 and 4 stores values that step 5 reads; here step 3 is computed between them.
    with pytest.raises(PlanError, match=r"step 5, site output: .* steps \[2, 4\]; .* those of \[3, 4\]"):
        whole.tail(2)
    apart = plan({"output": "CRCCFR"}, forecasts={(4, 5): LINE})
    assert apart.tail(2).forecasts == {(2, 5): LINE}
    refused = plan({"output": "CRRCFR"}, forecasts={(4, 5): LINE})
    with pytest.raises(
        PlanError, match=r"step 4, site output: the forecast's coefficients are for values of the steps \[0, 3\]"
    ):
        refused.tail(1)


@pytest.mark.parametrize("begin", [-1, 4, 1.5, True])
def test_a_beginning_that_is_no_step_is_refused(begin):
    with pytest.raises(PlanError, match=r"begin is .*expected a whole number"):
        plan({"ff": "CRRC"}).tail(begin)


def test_what_rests_on_measurements():
    whole = plan({"ff": "CRCR"})
    assert not rests_on_measurement(whole)
    assert rests_on_measurement(whole.with_header(samples=2))
    assert rests_on_measurement(whole.with_header(policy="l2c"))
    assert rests_on_measurement(plan({"output": "CCF"}, forecasts={(2, 5): LINE}))
