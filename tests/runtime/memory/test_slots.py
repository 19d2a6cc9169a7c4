"""Slots: what is stored, for how long, how many slots that takes, and how many bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepgraph as sg
from helpers.oracle import run_loop
from helpers.plans import plan_with_rows, random_rows
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_scheduler
from stepgraph.plan import CachePlan
from stepgraph.plan.liveness import traffic
from stepgraph.runtime.memory.arena import Arena, Place
from stepgraph.runtime.memory.layout import kept_dtype
from stepgraph.runtime.memory.slot_table import SlotMemory, SlotTable
from stepgraph.runtime.memory.slots import assign_slots


def lives(plan: CachePlan) -> list[tuple[int, int, int]]:
    """(site, step of its COMPUTE, step of its last read) of every stored value that is ever read, by brute force."""
    found = []
    for site in range(len(plan.sites)):
        for born in range(plan.steps):
            if plan.rows[born][site] != "C":
                continue
            reads = []
            for step in range(born + 1, plan.steps):
                if plan.rows[step][site] == "C":
                    break
                if plan.rows[step][site] == "R":
                    reads.append(step)
            if reads:
                found.append((site, born, reads[-1]))
    return found


def held_at(plan: CachePlan, step: int) -> list[int]:
    """Sites whose value is held while a step runs: both ends of a life included."""
    return [site for site, born, died in lives(plan) if born <= step <= died]


def brute_peak(plan: CachePlan) -> int:
    """Peak bytes per sample, by playing every branch of every step."""
    branches = len(plan.header.branches)
    held: list[set[int]] = [set() for _ in range(branches)]
    peak = 0
    for step in range(plan.steps):
        for branch in range(branches):
            held[branch] |= {site for site, born, _ in lives(plan) if born == step}
            peak = max(peak, sum(plan.sites[i].bytes for own in held for i in own))
            held[branch] -= {site for site, _, died in lives(plan) if died == step}
    assert not any(held)
    return peak


def check_plan(plan: CachePlan) -> None:
    slots = assign_slots(plan)
    held = [held_at(plan, step) for step in range(plan.steps)]
    assert slots.count == max(map(len, held))
    assert brute_peak(plan) == plan.summary().peak_slot_bytes
    assert slots.stored == len(lives(plan))
    contents: dict[int, tuple[int, int]] = {}
    for step, (moved, numbers) in enumerate(zip(traffic(plan), slots.steps, strict=True)):
        # Reads come before stores: every read finds the value that was computed last.
        for (site, part, age), slot in zip(moved.reads, numbers.reads, strict=True):
            born = max(s for s in range(step) if plan.rows[s][site] == "C")
            assert (part, age) == ("value", 1)
            assert contents[slot] == (site, born)
        for (site, part, made), slot in zip(moved.stores, numbers.stores, strict=True):
            assert slot not in contents
            assert (part, made) == ("value", step)
            contents[slot] = (site, step)
        assert sorted(site for site, _ in contents.values()) == sorted(held[step])
        for slot in numbers.frees:
            del contents[slot]
    assert contents == {}


@settings(max_examples=150)
@given(data=st.data())
def test_random_plans_on_paper(dit_sites, data):
    header, sites = dit_sites
    steps = data.draw(st.integers(2, 9))
    changed = {"timesteps": range(steps, 0, -1)}
    if data.draw(st.booleans()):
        changed |= {"guidance": "separate", "branches": ("cond", "uncond")}
    check_plan(CachePlan(header.__class__(**{**header.__dict__, **changed}), sites, data.draw(random_rows(sites, steps))))


@pytest.fixture(scope="module")
def dit_sites(dit):
    plan = sg.make_plan("full", model=dit, scheduler=tiny_scheduler("ddim"), steps=2)
    return plan.header, plan.sites


def run_and_watch(exe: sg.Executable, batch: int, separate: bool):
    """Run the plan once; the session and how many bytes it held after every call."""
    session, held = exe.session(), []

    def predict(**given):
        out = session(**given)
        held.append(session.slot_bytes)
        return out

    uncond = labels(*[NULL_CLASS] * batch)
    run_loop(
        predict,
        tiny_scheduler("ddim"),
        noise(batch),
        exe.plan.steps,
        4.0 if separate else 1.0,
        labels(*[1] * batch),
        uncond,
        separate,
    )
    return session, held


@settings(max_examples=10)
@given(data=st.data())
def test_measured_bytes_are_the_planned_ones(dit, dit_sites, data):
    guidance, batch = data.draw(st.sampled_from([("batched", 1), ("batched", 3), ("separate", 2)]))
    rows = data.draw(random_rows(dit_sites[1], 5))
    plan = plan_with_rows(dit, tiny_scheduler("ddim"), 5, rows, guidance)
    exe = sg.compile(dit, plan, inputs(batch), backend="eager", exact=True)
    planned = exe.memory()
    assert planned.peak_slot_bytes == brute_peak(plan) * batch
    session, held = run_and_watch(exe, batch, guidance == "separate")
    assert session.peak_slot_bytes == planned.peak_slot_bytes
    assert session.finished
    assert session.slot_bytes == held[-1] == 0
    branches = len(plan.header.branches)
    for step in range(plan.steps):
        surviving = [site for site, born, died in lives(plan) if born <= step < died]
        assert held[branches * step + branches - 1] == batch * branches * sum(plan.sites[i].bytes for i in surviving)


@pytest.mark.parametrize(
    ("actions", "slots", "stored", "values_held"),
    [
        ({}, 0, 0, [0, 0, 0, 0, 0, 0]),
        ({"ff": "CRCRCC"}, 2, 4, [2, 0, 2, 0, 0, 0]),
        # Stored only where read: the values of steps 0, 1, 3 and 5 are never read.
        ({"ff": "CCCCRC"}, 2, 2, [0, 0, 0, 2, 0, 0]),
        # A value that is read late is held through steps that do not touch it.
        ({"attn": "CRCRRC", "hidden": "CCCRCC"}, 3, 5, [2, 0, 3, 2, 0, 0]),
        ({"output": "CRRRRR"}, 1, 1, [1, 1, 1, 1, 1, 0]),
    ],
)
def test_known_plans(dit, ddim, actions, slots, stored, values_held):
    plan = sg.make_plan("manual", model=dit, scheduler=ddim, steps=6, actions=actions)
    exe = sg.compile(dit, plan, inputs(), backend="eager", exact=True)
    memory = exe.memory()
    assert (memory.slots, memory.values_stored) == (slots, stored)
    assert memory.weight_bytes == sum(p.nbytes for p in dit.parameters())
    tokens = plan.sites[0].bytes
    assert all(site.bytes == tokens for site in plan.sites)
    assert run_and_watch(exe, 1, False)[1] == [count * tokens for count in values_held]


def test_a_table_says_what_it_holds():
    arena = Arena.of(128, torch.device("cpu"))
    first, second = Place(0, (8,), torch.float32, torch.float32), Place(64, (2,), torch.float32, torch.float32)
    table = SlotTable(SlotMemory(arena, Arena.of(0, torch.device("cpu"))), 2, spoil=True)
    arena.write(first, torch.arange(8.0))
    table.hold(0, (first,))
    table.hold(1, (second,))
    assert table.bytes == 32 + 8
    assert table.read(0)[0].tolist() == list(range(8))
    table.free(0)
    assert table.bytes == 8
    assert bool(arena.target(first).isnan().all())
    with pytest.raises(RuntimeError, match="slot 0 is empty"):
        table.read(0)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_a_step_returns_is_the_callers(dit, ddim, backend):
    """The stored output of the model is returned at every other step; later steps do not write to what was returned."""
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=4, every=2, kinds=["output"])
    session = sg.compile(dit, plan, inputs(), backend=backend).session()
    outputs = [session(**inputs(seed=step)).sample for step in range(4)]
    copies = [output.clone() for output in outputs[:2]]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    session.reset()
    session(**inputs(seed=9))
    assert all(torch.equal(one, other) for one, other in zip(outputs, copies, strict=False))


def test_a_run_that_is_over_takes_no_more_calls(dit, ddim):
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=2)
    exe = sg.compile(dit, plan, inputs(), backend="eager", exact=True)
    session = exe.session()
    session(**inputs())
    assert session.slot_bytes > 0
    session(**inputs())
    with pytest.raises(sg.CompileError, match="all 2 steps of the plan have run"):
        session(**inputs())


def test_the_batch_cannot_change_within_a_run(dit, ddim):
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=2)
    session = sg.compile(dit, plan, inputs(), backend="eager", exact=True).session()
    session(**inputs(1))
    with pytest.raises(sg.CompileError, match=r"changed within a run, at step 1 \(batch 1 before, 2 now\)"):
        session(**inputs(2))
    assert (session.step, session.slot_bytes) == (0, 0)


# -- narrower dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float8_e4m3fn", 2**-4)])
def test_narrow_values_are_rounded_once(dtype, bound):
    """Relative to the value, or for eight bits, whose smallest step is 2 ** -9 of the largest over 448, to the sample."""
    value = torch.randn(3, 5, 8) * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1)
    kept, scale = getattr(torch, dtype), 512 if "8" in dtype else None
    place, arena = Place(0, (3, 5, 8), kept, torch.float32, scale), Arena.of(1024, torch.device("cpu"))
    arena.write(place, value)
    found = arena.read(place)
    assert found.dtype == torch.float32
    floor = value.abs().amax((1, 2), keepdim=True) * 2**-9 / 448 if "8" in dtype else 1e-5
    assert bool(((found - value).abs() <= bound * value.abs() + floor).all())
    assert place.nbytes == value.numel() * (1 if "8" in dtype else 2) + (3 * 4 if "8" in dtype else 0)
    arena.write(place, torch.zeros(3, 5, 8))
    assert bool((arena.read(place) == 0).all())


def test_what_increments_are_added_to_keeps_its_dtype():
    value = torch.randn(2, 3)
    assert kept_dtype(value, "value", torch.bfloat16) == torch.bfloat16
    assert kept_dtype(value, "value", None) == torch.float32
    for part in ("maps", "input"):
        assert kept_dtype(value, part, torch.bfloat16) == torch.float32
    # Nothing is made wider.
    assert kept_dtype(value.half(), "value", torch.bfloat16) == torch.float16


@pytest.mark.parametrize(("dtype", "worst"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float8_e4m3fn", 2**-4)])
@pytest.mark.parametrize("kinds", [["attn", "ff"], ["hidden"]])
def test_a_run_holds_what_was_promised(dit, dtype, worst, kinds):
    plan = sg.make_plan("interval", model=dit, scheduler=tiny_scheduler("ddim"), steps=6, every=2, kinds=kinds)
    exe = sg.compile(dit, plan, inputs(2), backend="eager", slot_dtype=dtype)
    wide = sg.compile(dit, plan, inputs(2), backend="eager")
    outputs = []
    for runner in (exe, wide):
        session = runner.session()
        outputs.append([session(**inputs(2, seed=step)).sample for step in range(6)][-1])
        assert session.peak_slot_bytes == runner.memory().peak_slot_bytes
    assert 0 < float((outputs[0] - outputs[1]).norm() / outputs[1].norm()) < worst
    assert exe.memory().peak_slot_bytes < 0.51 * wide.memory().peak_slot_bytes


def test_other_storage_is_refused(dit, ddim):
    plan = sg.make_plan("full", model=dit, scheduler=ddim, steps=2)
    with pytest.raises(ValueError, match="slot_dtype is 'int8'; expected None or one of bfloat16"):
        sg.compile(dit, plan, inputs(), slot_dtype="int8")
    with pytest.raises(ValueError, match="exact=True keeps stored values as they are"):
        sg.compile(dit, plan, inputs(), backend="eager", exact=True, slot_dtype="bfloat16")
