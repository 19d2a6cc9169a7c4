"""Summary, heat map and difference of plans."""

import errno
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import stepgraph as sg
from helpers.example_plans import HEADER, PLAN, SITES, build
from helpers.tiny import inputs
from stepgraph.plan import KINDS, CachePlan
from stepgraph.plan.corrections import Forecast
from stepgraph.plan.plot import COLOURS, DIFFERENCES, FIRST, OTHERWISE, SAME, plot_diff
from stepgraph.plan.report import diff_plans


def test_summary_counts_by_hand():
    # Rows: CCCCCCCCC, CRCCRCCCC, .......RC
    summary = PLAN.summary()
    counts = {c.kind: (c.sites, c.computed, c.reused, c.corrected, c.dead) for c in summary.kinds}
    assert counts == {
        "attn": (2, 4, 0, 0, 2),
        "ff": (2, 2, 2, 0, 2),
        "block": (2, 4, 0, 0, 2),
        "stack_residual": (1, 2, 0, 0, 1),
        "hidden": (1, 2, 1, 0, 0),
        "output": (1, 3, 0, 0, 0),
    }
    assert summary.macs == 100 + (100 - 20 - 20) + (100 - 90)
    assert summary.macs_total == 300
    assert summary.ideal_speedup == 300 / 170
    # The two ff of step 0 until step 1, and hidden from step 1 on.
    assert summary.peak_slot_bytes == 12
    assert [c.kind for c in summary.kinds] == [kind for kind in KINDS if kind in counts]
    assert summary.kinds[1].reuse_rate == pytest.approx(4 / 6)


def test_two_branches_cost_twice():
    separate = CachePlan.build(
        HEADER.__class__(**{**HEADER.__dict__, "guidance": "separate", "branches": ("cond", "uncond")}), SITES, {"ff": "CRR"}
    )
    single = build({"ff": "CRR"})
    assert separate.summary().macs == 2 * single.summary().macs
    assert separate.summary().peak_slot_bytes == 2 * single.summary().peak_slot_bytes == 16


def test_summary_of_a_corrected_plan_and_of_one_that_computes_nothing():
    corrected = {c.kind: c for c in build({"ff": "CLF"}).summary().kinds}["ff"]
    assert (corrected.computed, corrected.corrected, corrected.reused) == (2, 4, 0)
    free = CachePlan.build(HEADER, [site.__class__(**{**site.__dict__, "macs": 0}) for site in SITES], {})
    assert free.summary().ideal_speedup == 1.0
    assert "policy manual, 3 steps" in str(free.summary())


def test_summary_as_text_and_as_data():
    text = str(PLAN.summary())
    assert "ff                2 sites   66.7% not computed  (computed 2, reused 2, corrected 0, dead 2)" in text
    assert "ideal 1.76x" in text
    data = json.loads(json.dumps(PLAN.summary().as_dict()))
    assert data["kinds"]["ff"]["reused"] == 2
    assert data["macs"] == 170


@pytest.mark.parametrize(
    "actions",
    [
        {"attn": "CRRC"},
        {"ff": "CCRR"},
        {"attn": "CRCR", "ff": "CRRR"},
        {"hidden": "CRCR"},
        {"stack_residual": "CRRC"},
        {"output": "CRRR"},
        {"block": "CRCR"},
        {"attn": "CRCC", "hidden": "CCRC", "output": "CCCR"},
        {"transformer_blocks.1.ff": "CRRR"},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("guidance", ["batched", "separate"])
def test_summary_agrees_with_the_compiled_graphs(dit, ddim, actions, guidance):
    plan = sg.make_plan("manual", model=dit, scheduler=ddim, steps=4, guidance=guidance, actions=actions)
    exe = sg.compile(dit, plan, inputs(3), backend="eager", exact=True)
    summary, macs = plan.summary(), exe.macs()
    assert (macs.computed, macs.total) == (3 * summary.macs, 3 * summary.macs_total)
    assert sum(macs.per_step) == macs.computed
    assert macs.ideal_speedup == pytest.approx(summary.ideal_speedup)
    assert exe.memory().peak_slot_bytes == 3 * summary.peak_slot_bytes


def painted(path) -> dict[tuple[int, ...], int]:
    """Colour -> number of pixels."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(colour): count for colour, count in zip(colours.tolist(), counts.tolist(), strict=True)}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize(
    ("actions", "shown", "absent"),
    [
        ({"ff": "CRR"}, "CR", "LF."),
        ({"ff": "CLF", "hidden": "CCR"}, "CLR.", ""),
        ({}, "C", "RLF."),
        ({"output": "CFF"}, "CF.", "RL"),
    ],
    ids=str,
)
def test_plot_paints_the_actions(tmp_path, actions, shown, absent):
    figure = build(actions).plot(tmp_path / "plan.png")
    assert figure.axes
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]
    area = painted(tmp_path / "plan.png")
    for letter in shown:
        assert area.get(rgb(COLOURS[letter]), 0) > 100, letter
    for letter in absent:
        assert area.get(rgb(COLOURS[letter]), 0) < 100, letter


def cells(axis) -> list[list[float | None]]:
    """The numbers that a panel's colours stand for; None where nothing is drawn."""
    return axis.collections[0].get_array().tolist()


def test_two_plans_are_drawn_beside_what_differs(tmp_path):
    first, second = build({"ff": "CRR"}), build({"ff": "CRC", "blocks.0.attn": "CRR", "hidden": "CCR"})
    figure = plot_diff(first, second, tmp_path / "diff.png")
    # attn, ff and hidden, each for A, B and the difference.
    panels = [cells(axis) for axis in figure.axes]
    compute, reuse, dead = 0, 1, 4
    assert panels[0] == [[compute] * 3, [compute] * 3]
    assert panels[1] == [[compute, reuse, dead], [compute, compute, dead]]
    same, only_a, only_b, neither = range(4)
    assert panels[2] == [[same, only_a, only_a], [same, same, only_a]]
    # Reused in A and inside a reused site in B.
    assert panels[5] == [[same, same, neither]] * 2
    assert panels[8] == [[same, same, only_a]]
    assert only_b not in np.array(panels[2] + panels[5] + panels[8])
    assert "A: manual" in figure.axes[0].get_title(loc="left")
    area = painted(tmp_path / "diff.png")
    for name in (SAME, FIRST, OTHERWISE):
        assert area.get(rgb(DIFFERENCES[name]), 0) > 100, name


def test_a_site_that_one_plan_does_not_have_stays_blank():
    other = CachePlan.build(HEADER, SITES[1:], {"ff": "CRR"})
    panels = [cells(axis) for axis in plot_diff(PLAN, other).axes]
    blank = [None] * 3
    assert [panel[0] == blank for panel in panels[:3]] == [False, True, True]
    assert blank not in (panels[0][1], panels[1][1], panels[2][1])


def test_plans_of_different_lengths_are_drawn_without_a_difference(tmp_path):
    longer = PLAN.header.__class__(**{**PLAN.header.__dict__, "steps": 4, "timesteps": (9, 6, 3, 0)})
    figure = plot_diff(PLAN, CachePlan.build(longer, SITES, {"ff": "CRCR"}), tmp_path / "diff.png")
    assert figure.get_suptitle() == "3 and 4 evaluations: no step by step difference"
    assert len(figure.axes) == 3 * 2
    assert [len(cells(axis)[0]) for axis in figure.axes[:2]] == [3, 4]
    assert diff_plans(PLAN, CachePlan.build(longer, SITES, {}))["pairs_changed"] is None


def test_a_plot_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        PLAN.plot(tmp_path / "plan.png")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_difference_of_two_plans():
    assert diff_plans(PLAN, PLAN) == {
        "header": {},
        "only_in_first": [],
        "only_in_second": [],
        "sites": {},
        "pairs_changed": 0,
        "forecasts_changed": 0,
    }
    other = CachePlan.build(HEADER, SITES[:-1], {"ff": "CRC", "attn": "CRR"}).with_header(policy="else")
    found = diff_plans(PLAN, other)
    assert found["header"] == {"policy": ["manual", "else"]}
    assert (found["only_in_first"], found["only_in_second"]) == (["output"], [])
    assert found["sites"]["blocks.0.attn"] == ["CC.", "CRR"]
    ff = next(i for i, site in enumerate(SITES) if site.kind == "ff")
    forecast = CachePlan.build(HEADER, SITES, {"ff": "CCF"})
    first, second = (replace(forecast, forecasts={(2, ff): Forecast(("y1", "y2"), ((c, 1 - c),))}) for c in (2.0, 1.5))
    assert [diff_plans(a, b)["forecasts_changed"] for a, b in ((forecast, first), (first, second), (first, first))] == [1, 1, 0]
    assert found["pairs_changed"] == sum(a != b for was, now in found["sites"].values() for a, b in zip(was, now, strict=True))
