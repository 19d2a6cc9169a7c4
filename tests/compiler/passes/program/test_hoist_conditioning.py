"""What depends on the prompt or the timestep alone is computed before the loop, and never stale."""

import logging

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.distance import SAME_RUN, error
from helpers.families import FLUX, flux_inputs, flux_plan
from helpers.families import STEPS as FLUX_STEPS
from helpers.pixart_sd3 import PIXART, pixart_inputs, planned
from helpers.tiny import NULL_CLASS, TINY, inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.compiler.marking.graphs import written_storages
from stepgraph.compiler.passes.fuse.fold_constants import fold_constants
from stepgraph.compiler.passes.program.hoist_conditioning import Inputs, Level, levels_of
from stepgraph.compiler.specializing.passes import is_wanted
from stepgraph.compiler.tracing.trace import trace
from stepgraph.config import CompileConfig
from stepgraph.errors import CompileError
from stepgraph.runtime.program import tables

STEPS, BLOCKS = 6, TINY["num_layers"]


def compiled(model, *, every=2, **options):
    plan = sg.make_plan("interval", model=model, scheduler=tiny_scheduler("ddim"), steps=STEPS, every=every)
    return sg.compile(model, plan, inputs(2), backend="eager", **options)


def sampled(runner, **options):
    given = {"class_labels": torch.tensor([1, 2]), **options}
    return sg.sample(runner, tiny_scheduler("ddim"), noise(2), **given)


def steps_of(executable, sequence):
    """The outputs of a session that is given one call's inputs after the other."""
    session = executable.session()
    return [session(**given).sample for given in sequence]


def schedule():
    scheduler = tiny_scheduler("ddim")
    scheduler.set_timesteps(STEPS)
    return [int(t) for t in scheduler.timesteps]


def run_inputs():
    return [{**inputs(2, seed=step), "timestep": torch.full((2,), t)} for step, t in enumerate(schedule())]


def test_rows_take_only_the_tables_they_read(dit):
    exe = compiled(dit)
    computed, reused = (exe.default.variants[exe.default.rows[step]] for step in (0, 1))
    # Shift, scale and gate of both modules of a block; shift and scale of the head. A reused module needs its gate alone.
    assert len(computed.tables) == 6 * BLOCKS + 2
    assert len(reused.tables) == 2 * BLOCKS + 2
    modules = [n.target for n in reused.graph.graph.nodes if n.op == "call_module"]
    assert modules == ["pos_embed.proj", "proj_out_2"]
    assert not any(
        "emb" in str(n.target) for n in computed.graph.graph.nodes if n.op == "call_module" and "pos" not in n.target
    )


def test_the_bytes_of_tables_are_those_of_their_steps(dit):
    exe, channels = compiled(dit), TINY["num_attention_heads"] * TINY["attention_head_dim"]
    per_step = [table for table in exe.default.hoisted.tables if table.per_step]
    assert {table.bytes for table in per_step} == {STEPS * 2 * channels * 4}
    assert exe.memory().table_bytes == sum(table.bytes for table in exe.default.hoisted.tables)
    assert compiled(dit, hoist=False).memory().table_bytes == 0


@pytest.mark.parametrize("every", [1, 2])
def test_tables_change_no_bit_in_exact_mode(dit, every):
    exact = sampled(compiled(dit, every=every, exact=True))
    assert torch.equal(exact, sampled(compiled(dit, every=every, exact=True, hoist=False)))
    assert error(sampled(compiled(dit, every=every)), exact) < SAME_RUN
    if every == 1:
        assert torch.equal(exact, sampled(dit, steps=STEPS))


@pytest.mark.parametrize("exact", [True, False])
def test_new_conditioning_within_a_run_is_seen(dit, exact):
    """As a callback of a pipeline may do; swapped, and written to in place."""
    exe = compiled(dit, every=1, exact=exact)
    sequence = run_inputs()
    sequence[2]["class_labels"] = torch.tensor([7, 8])
    session = exe.session()
    for step, given in enumerate(sequence):
        if step == 4:
            given["class_labels"] = sequence[3]["class_labels"].fill_(NULL_CLASS)
        found, expected = session(**given).sample, dit(**given).sample
        assert torch.equal(found, expected) if exact else error(found, expected) < SAME_RUN, step


def test_conditioning_without_versions_is_compared_by_value(dit):
    with torch.inference_mode():
        sequence, given = run_inputs(), torch.tensor([1, 2])
        session = compiled(dit, every=1, exact=True).session()
        for step, call in enumerate(sequence):
            given[0] = step
            call["class_labels"] = given
            assert torch.equal(session(**call).sample, dit(**call).sample), step


def test_a_timestep_that_is_not_the_schedulers_gets_tables_of_its_own(dit):
    exe = compiled(dit, every=1)
    for changed in ([3], range(STEPS)):
        sequence = run_inputs()
        for step in changed:
            sequence[step]["timestep"] = sequence[step]["timestep"] + 1
        for found, given in zip(steps_of(exe, sequence), sequence, strict=True):
            assert error(found, dit(**given).sample) < SAME_RUN


def test_timesteps_may_differ_within_a_batch(dit):
    sequence = run_inputs()
    for given in sequence:
        given["timestep"] = given["timestep"] - torch.tensor([0, 1])
    for found, given in zip(steps_of(compiled(dit, every=1), sequence), sequence, strict=True):
        assert error(found, dit(**given).sample) < SAME_RUN


def test_beyond_the_limit_values_stay_in_the_loop(dit, caplog):
    free = compiled(dit)
    limit = free.memory().table_bytes / 2
    with caplog.at_level(logging.WARNING, logger="stepgraph.hoist"):
        exe = compiled(dit, hoist_limit_mb=limit / 1e6)
    assert "stay in the loop" in caplog.text
    assert 0 < exe.memory().table_bytes <= limit
    assert exe.default.hoisted.kept
    assert error(sampled(exe), sampled(free)) < SAME_RUN
    none = compiled(dit, hoist_limit_mb=0)
    assert none.memory().table_bytes == 0
    assert error(sampled(none), sampled(free)) < SAME_RUN
    with pytest.raises(ValueError, match="hoist_limit_mb is -1; expected megabytes"):
        compiled(dit, hoist_limit_mb=-1)


def test_sessions_have_tables_of_their_own(dit):
    exe = compiled(dit, exact=True)
    alone = [sampled(exe, class_labels=torch.tensor(own)) for own in ([1, 2], [3, 4])]
    first, second = exe.session(), exe.session()
    for step, given in enumerate(run_inputs()):
        found = [s(**{**given, **labels(*own)}).sample for s, own in ((first, (1, 2)), (second, (3, 4)))]
        assert not torch.equal(*found), step
    assert torch.equal(sampled(exe, class_labels=torch.tensor([1, 2])), alone[0])


def test_branches_have_tables_of_their_own(dit):
    plan = sg.make_plan(
        "interval", model=dit, scheduler=tiny_scheduler("ddim"), steps=STEPS, every=1, guidance="separate"
    )  # fmt: skip
    given = {"class_labels": torch.tensor([1]), "negative_class_labels": torch.tensor([NULL_CLASS]), "guidance_scale": 2.0}
    exe = sg.compile(dit, plan, inputs(1), backend="eager")
    found = sg.sample(exe, tiny_scheduler("ddim"), noise(1), **given)
    assert error(found, sg.sample(dit, tiny_scheduler("ddim"), noise(1), steps=STEPS, **given)) < SAME_RUN


def test_equal_values_are_one_table():
    """Every block of FLUX gives the same rotary tables their dimensions anew."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**FLUX).eval()
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    exe = sg.compile(model, flux_plan(model, flow, {}), flux_inputs(), backend="eager")
    graph = exe.default.variants[0].graph.graph
    rotary = [n for n in graph.nodes if n.op == "placeholder" and "table" in n.meta and n.meta["val"].shape[-1] == 16]
    blocks = FLUX["num_layers"] + FLUX["num_single_layers"]
    assert len(rotary) == 2
    assert all(len(node.users) >= 2 * blocks for node in rotary)
    given = flux_inputs()
    session = exe.session()
    for _ in range(FLUX_STEPS):
        assert error(session(**given).sample, model(**given).sample) < SAME_RUN


def test_what_writes_in_place_or_is_random_stays_in_the_loop():
    class Odd(torch.nn.Module):
        def forward(self, x, timestep, label):
            table = label * 2.0
            table.add_(timestep)
            return x + table + torch.rand(1) + (label + 1)

    graph = trace(Odd().eval(), {"x": torch.zeros(2), "timestep": torch.zeros(2), "label": torch.zeros(2)}).graph
    levels = levels_of(graph, Inputs(("x", "timestep", "label")))
    by_name = {str(getattr(n.target, "__name__", n.target)): level for n, level in levels.items()}
    assert by_name["add_"] == by_name["rand"] == Level.LATENT
    assert by_name["timestep"] == Level.TIMESTEP
    assert by_name["label"] == Level.PROMPT


def test_an_accelerators_wrong_timesteps_are_refused_at_the_end(dit, monkeypatch):
    """Where comparing each timestep would wait for the device, the comparison is collected; played through on the CPU."""
    exe = compiled(dit, every=1)
    held = tables.Tables(exe.default.hoisted, exe.plan.header.timesteps, batched=True)
    monkeypatch.setattr(tables, "waits", lambda device: True)
    sequence, label = run_inputs(), torch.tensor([1, 2])
    sequence[3]["timestep"] = sequence[3]["timestep"] + 1
    for step, given in enumerate(sequence):
        held.at(step, {**given, "class_labels": label})
    with pytest.raises(CompileError, match="not the scheduler's"):
        held.finish()


@pytest.mark.parametrize("later", [False, True], ids=["at once", "at the end"])
def test_conditioning_that_is_written_to_past_its_version_is_noticed(dit, monkeypatch, later):
    """On an accelerator, played through on the CPU, digests are compared and the run is refused when it ends."""
    exe = compiled(dit, every=1)
    monkeypatch.setattr(tables, "waits", lambda device: later)
    held, fresh = (tables.Tables(exe.default.hoisted, exe.plan.header.timesteps, batched=False) for _ in range(2))
    sequence, label = run_inputs(), torch.tensor([1, 2])
    held.at(0, {**sequence[0], "class_labels": label})
    label.numpy()[:] = 3
    values = held.at(1, {**sequence[1], "class_labels": label})
    if later:
        # What was found is not lost where tables are computed anew for another reason.
        for look in (held.forget, held.finish):
            with pytest.raises(CompileError, match="conditioning was written to within this run"):
                look()
        return
    for value, wanted in zip(values, fresh.at(1, {**sequence[1], "class_labels": label}), strict=True):
        assert torch.equal(value, wanted)
    held.finish()


def test_the_end_of_a_run_is_checked_where_its_last_step_reads_no_table(dit, monkeypatch):
    actions = {"output": "C" * (STEPS - 1) + "R"}
    plan = sg.make_plan("manual", model=dit, scheduler=tiny_scheduler("ddim"), steps=STEPS, actions=actions)
    session = sg.compile(dit, plan, inputs(2), backend="eager").session()
    monkeypatch.setattr(tables, "waits", lambda device: True)
    sequence, label = run_inputs(), torch.tensor([1, 2])
    sequence[3]["timestep"] = sequence[3]["timestep"] + 1
    for given in sequence[:-1]:
        session(**{**given, "class_labels": label})
    assert not session.executable.default.variants[-1].tables
    with pytest.raises(CompileError, match="not the scheduler's"):
        session(**{**sequence[-1], "class_labels": label})


def test_conditioning_made_anew_at_every_step_is_not_batched_each_time(dit, monkeypatch):
    monkeypatch.setattr(tables, "waits", lambda device: True)
    exe, batches = compiled(dit, every=1), []
    compute = tables.Tables._compute_all
    monkeypatch.setattr(tables.Tables, "_compute_all", lambda self, *given: batches.append(1) or compute(self, *given))
    sequence = [{**given, "class_labels": torch.tensor([1, 2])} for given in run_inputs()]
    for found, given in zip(steps_of(exe, sequence), sequence, strict=True):
        assert error(found, dit(**given).sample) < SAME_RUN
    assert len(batches) == 2


def test_three_blocks_have_three_blocks_tables():
    model = tiny_dit(seed=1, num_layers=3)
    assert len(compiled(model).default.variants[0].tables) == 6 * 3 + 2


def test_constants_of_a_tensors_shape_are_no_tables_of_all_steps():
    """The gate of ones behind which PixArt's stored cross-attention joins a run of updates."""
    torch.manual_seed(0)
    model, given = diffusers.PixArtTransformer2DModel(**PIXART).eval(), pixart_inputs(2)
    plan = planned(model, given, {"attn": "CRCR", "cross_attn": "CRCR"})
    exe = sg.compile(model, plan, given, backend="eager")
    constants = [table for table in exe.default.hoisted.tables if "ones_like" in table.name]
    assert [(table.per_step, table.bytes) for table in constants] == [(False, 2 * 32 * 4)]
    session, exact = exe.session(), sg.compile(model, plan, given, backend="eager", exact=True).session()
    for t in plan.header.timesteps:
        step = {**given, "timestep": torch.full((2,), int(t))}
        assert error(session(**step).sample, exact(**step).sample) < SAME_RUN


def test_what_is_folded_is_what_was_there():
    class Filled(torch.nn.Module):
        def forward(self, x, timestep):
            written = torch.zeros_like(x)
            written.add_(timestep)
            wide = torch.full_like(x, 2.5, dtype=torch.float64) + x.new_full((3, 1), 4) + x.new_ones(2)
            return wide + torch.zeros_like(x) + torch.rand_like(x) * 0 + written

    model, x, timestep = Filled().eval(), torch.randn(3, 2), torch.ones(())
    traced = trace(model, {"x": x, "timestep": timestep})
    written, gm = written_storages(traced.graph), traced.bind(model)
    assert not is_wanted(fold_constants, CompileConfig("eager", exact=True))
    assert fold_constants(gm, PassContext((), "", (), (), written)) == 4
    gm.recompile()
    assert torch.equal(gm(x, timestep)[0], model(x, timestep))
