"""Offsets in a session's arena: nothing that is needed at one moment shares bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepgraph as sg
from helpers.plans import random_rows
from helpers.tiny import TINY, inputs, tiny_scheduler
from stepgraph.plan import CachePlan
from stepgraph.runtime.memory.arena import ALIGNMENT, Span, aligned, assign_offsets

SPANS = st.lists(
    st.builds(
        lambda nbytes, first, length, name: Span(nbytes, first, first + length, name),
        st.integers(1, 500), st.integers(0, 20), st.integers(0, 8), st.sampled_from([None, "a", "b"]),
    ),
    max_size=25,
)  # fmt: skip


def most_alive(spans: list[Span]) -> int:
    """The most bytes, in whole cache lines, needed at one moment: no arrangement takes less."""
    return max((sum(aligned(s.nbytes) for s in spans if s.first <= t <= s.last) for t in range(30)), default=0)


@given(spans=SPANS)
def test_no_two_spans_share_bytes_and_time(spans):
    offsets, total = assign_offsets(spans)
    assert len(offsets) == len(spans)
    for i, (one, start) in enumerate(zip(spans, offsets, strict=True)):
        assert start % ALIGNMENT == 0
        assert start + one.nbytes <= total
        for other, begin in list(zip(spans, offsets, strict=True))[:i]:
            apart = one.last < other.first or other.last < one.first
            assert apart or start + one.nbytes <= begin or begin + other.nbytes <= start
    assert total >= most_alive(spans)


@given(lives=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), max_size=25))
def test_equal_sizes_take_what_is_alive_at_once(lives):
    spans = [Span(100, first, first + length) for first, length in lives]
    assert assign_offsets(spans)[1] == most_alive(spans)


def test_what_recurs_keeps_its_place():
    """Two values in turns, the second of which outlives the first: the lowest gap alone would swap their places."""
    spans = [Span(64, 0, 1, "a"), Span(64, 1, 3, "b"), Span(64, 2, 4, "a"), Span(64, 4, 6, "b"), Span(64, 5, 7, "a")]
    offsets, total = assign_offsets(spans)
    assert total == 128
    assert len({offset for offset, span in zip(offsets, spans, strict=True) if span.name == "a"}) == 1


@settings(max_examples=8)
@given(data=st.data())
def test_values_that_are_kept_at_once_are_apart(dit, data):
    header = sg.make_plan("full", model=dit, scheduler=tiny_scheduler("ddim"), steps=5).header
    sites = sg.make_plan("full", model=dit, scheduler=tiny_scheduler("ddim"), steps=5).sites
    plan = CachePlan(header, sites, data.draw(random_rows(sites, 5)))
    exe = sg.compile(dit, plan, inputs(), backend="eager", exact=True)
    program, held = exe.default, {}
    for step, moves in enumerate(program.slots.steps):
        for slot, places in zip(moves.stores, program.layout.steps[step][0].stores, strict=True):
            held[slot] = places[0]
        ranges = sorted((place.offset, place.offset + place.nbytes) for place in held.values())
        assert all(one[1] <= other[0] for one, other in zip(ranges, ranges[1:], strict=False))
        assert all(end <= program.layout.nbytes for _, end in ranges)
        for slot in moves.frees:
            del held[slot]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_arena_is_what_was_promised(dit, backend):
    """All values of the tiny model are of one size, so that nothing is lost between them."""
    plan = sg.make_plan("interval", model=dit, scheduler=tiny_scheduler("ddim"), steps=6, every=2)
    exe = sg.compile(dit, plan, inputs(2), backend=backend)
    session, memory = exe.session(), exe.memory()
    assert session.arena_bytes == 0
    session(**inputs(2))
    assert session.arena_bytes == memory.arena_bytes == memory.peak_slot_bytes + memory.work_bytes
    assert (memory.work_bytes == 0) == (backend == "eager")


def test_freed_values_are_not_read_under_the_check(dit, ddim, monkeypatch):
    """With STEPGRAPH_CHECK freed places are NaN: a step that read one would give NaN, which the check refuses."""
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=6, every=3)
    exe = sg.compile(dit, plan, inputs(), backend="eager")
    plain, checked = exe.session(), None
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    checked = exe.session()
    for step in range(6):
        assert torch.equal(plain(**inputs(seed=step)).sample, checked(**inputs(seed=step)).sample)
    (memory,) = checked.memory.values()
    assert bool(memory.arena.memory.view(torch.float32).isnan().all())


# -- off-loading ---------------------------------------------------------------------------------------------------------


def far_apart(dit, ddim):
    """The model's output is reused at steps 1 to 6; ff values of step 0 are read at step 7 alone."""
    actions = {"output": "CRRRRRRCC", "ff": "CRRRRRRRC"}
    return sg.make_plan("manual", model=dit, scheduler=ddim, steps=9, actions=actions)


def test_values_leave_between_uses_that_are_far_apart(dit, ddim):
    exe = sg.compile(dit, far_apart(dit, ddim), inputs(), backend="eager", exact=True, offload=True)
    layout, layers = exe.default.layout, TINY["num_layers"]
    assert [len(moves[0].leave) for moves in layout.steps] == [0, layers, 0, 0, 0, 0, 0, 0, 0]
    assert [len(moves[0].come) for moves in layout.steps] == [0, 0, 0, 0, 0, 0, layers, 0, 0]
    tokens, output = exe.plan.sites[0].bytes, exe.plan.sites[-1].bytes
    assert layout.host_bytes == layers * aligned(tokens)
    assert layout.peak_bytes == layers * tokens + output
    session = exe.session()
    held = []
    for step in range(9):
        session(**inputs(seed=step))
        held.append(session.slot_bytes)
    both = layers * tokens + output
    assert held == [both, output, output, output, output, output, layers * tokens, 0, 0]


@pytest.mark.parametrize("slot_dtype", [None, "float8_e4m3fn"])
def test_offloaded_values_are_the_same(dit, ddim, slot_dtype, monkeypatch):
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    plan = far_apart(dit, ddim)
    near = sg.compile(dit, plan, inputs(2), backend="eager", slot_dtype=slot_dtype)
    far = sg.compile(dit, plan, inputs(2), backend="eager", slot_dtype=slot_dtype, offload=True)
    one, other = near.session(), far.session()
    for step in range(plan.steps):
        assert torch.equal(one(**inputs(2, seed=step)).sample, other(**inputs(2, seed=step)).sample)
    assert other.peak_slot_bytes == far.memory().peak_slot_bytes
    assert one.peak_slot_bytes == near.memory().peak_slot_bytes
    assert far.memory().host_bytes > near.memory().host_bytes == 0


def test_a_run_may_begin_in_inference_mode_and_go_on_outside(dit, ddim):
    exe = sg.compile(dit, far_apart(dit, ddim), inputs(2), backend="eager", offload=True)
    session, plain = exe.session(), exe.session()
    for step in range(exe.plan.steps):
        with torch.inference_mode(step < 5):
            found = session(**inputs(2, seed=step)).sample
        assert torch.equal(found, plain(**inputs(2, seed=step)).sample)
