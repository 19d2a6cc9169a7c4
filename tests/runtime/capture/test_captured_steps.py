"""Captured steps of sessions and pipelines, on a tape that stands for CUDA graphs: what they give without, or a reason."""

from dataclasses import replace

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.captures import REUSED, STEPS, planned, with_calls
from helpers.corrections import factors_of, maps_of
from helpers.distance import SAME_RUN, error
from helpers.oracle import Oracle, run_loop
from helpers.pipes import images, oracle_images
from helpers.tape import Tape
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_dit
from stepgraph.runtime.capture import cudagraph

DDIM = diffusers.DDIMScheduler
ROW = {"backend": "eager", "cuda_graphs": True}


def compiled(dit, actions=REUSED, guidance="none", **options) -> sg.Executable:
    return sg.compile(dit, planned(dit, DDIM(), actions, guidance), inputs(2), **(ROW | options))


def runs(exe, capture: bool, scale: float = 1.0) -> list[torch.Tensor]:
    """Two prompts from two noises, and the first again, on sessions in the tests' own loop."""
    uncond, separate = labels(NULL_CLASS, NULL_CLASS), exe.plan.header.guidance == "separate"
    return [
        run_loop(exe.session(capture), DDIM(), noise(2, seed), STEPS, scale, labels(*classes), uncond, separate)[0]
        for seed, classes in [(0, (1, 2)), (1, (3, 4)), (0, (1, 2))]
    ]


def assert_same(exe, scale: float = 1.0):
    wanted, got = (runs(exe, capture, scale) for capture in (False, True))
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
    assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize(("guidance", "scale", "branches"), [("none", 1.0, 1), ("separate", 3.0, 2)])
def test_captured_steps_are_the_steps(dit, tape, guidance, scale, branches):
    exe = compiled(dit, guidance=guidance)
    assert_same(exe, scale)
    # Five distinct calls, of which one is made twice a run; each is replayed once to be compared.
    assert [len(one.recorded) for one in tape] == [5 * branches]
    assert len(tape[0].replayed) == 3 * STEPS * branches


def test_captured_steps_are_the_oracle(dit):
    exe = compiled(dit)
    wanted = run_loop(Oracle.of(dit, exe.plan), DDIM(), noise(2, 1), STEPS, 1.0, labels(3, 4), None)[0]
    got = runs(exe, capture=True)[1]
    assert error(got, wanted) <= SAME_RUN


def test_forecasts_increments_and_narrow_slots_are_captured(dit):
    forecast = sg.forecast(planned(dit, DDIM()), order=1)
    assert len({forecast.forecasts[key].coefficients for key in forecast.forecasts}) > 1
    for dtype in ("bfloat16", "float8_e4m3fn"):
        assert_same(sg.compile(dit, forecast, inputs(2), slot_dtype=dtype, **ROW))
    factors = factors_of(dit, maps_of(dit))
    plan = planned(dit, DDIM(), {"attn": "CLCLCL", "ff": "CRLRCL"})
    plan = replace(plan, header=replace(plan.header, factors=factors.digest))
    assert_same(sg.compile(dit, plan, inputs(2), factors=factors, **ROW))


@pytest.mark.parametrize("options", [{"hoist": False}, {"exact": True}])
def test_tables_of_every_kind_are_copied_in(dit, options):
    assert_same(compiled(dit, **options))


def test_a_pipeline_gives_the_oracles_images(pipe, tape):
    actions = {"attn": "CRCR", "ff": "CRRR", "hidden": "CCCR"}
    plan = sg.make_plan("manual", model=pipe.transformer, scheduler=pipe.scheduler, steps=4, actions=actions)
    exe = sg.compile(pipe.transformer, plan, inputs(2), exact=True, **ROW)
    # Batches of one and of three, guided; each batch size is a program of its own.
    cases = [{"batch": 1, "seed": 0}, {"batch": 3, "seed": 1}, {"batch": 1, "seed": 2}]
    wanted = [oracle_images(pipe, plan, **case) for case in cases]
    exe.attach(pipe)
    assert all(torch.equal(images(pipe, **case), expected) for case, expected in zip(cases, wanted, strict=True))
    assert len(tape[0].recorded) == 2 * 4
    # A run that was given up leaves the captures to the next.
    pipe.scheduler.set_timesteps(4)
    pipe.transformer(**inputs(2, timestep=int(pipe.scheduler.timesteps[0])))
    assert torch.equal(images(pipe, **cases[0]), wanted[0])
    assert len(tape[0].recorded) == 2 * 4
    exe.detach()


def test_runs_at_the_same_time_do_not_share_places(dit, tape):
    exe = compiled(dit)
    wanted = runs(exe, capture=False)
    first, second = exe.session(), exe.session()
    # The second begins while the first one runs, and so does without.
    results = []
    own = DDIM()
    own.set_timesteps(STEPS)
    latents = {first: noise(2), second: noise(2, 1)}
    for t in own.timesteps:
        for session, classes in ((first, (1, 2)), (second, (3, 4))):
            out = session(hidden_states=latents[session], timestep=t.expand(2), **labels(*classes)).sample
            latents[session] = own.step(out.chunk(2, dim=1)[0], t, latents[session]).prev_sample
            results.append(out)
    assert torch.equal(latents[first], wanted[0])
    assert torch.equal(latents[second], wanted[1])
    assert len(tape[0].replayed) == STEPS
    # What was returned is the caller's: steps 1 and 3 of the first run are replays of one graph.
    assert not torch.equal(results[2], results[6])
    # What an exception ends is free again.
    ended = exe.session()
    ended(**inputs(2))
    with pytest.raises(sg.PlanError):
        ended(timestep=torch.tensor([1, 1]))
    assert torch.equal(runs(exe, capture=True)[0], wanted[0])
    assert len(tape[0].replayed) == 1 + 4 * STEPS


def test_without_a_wish_a_call_is_captured_at_its_second_use(dit, tape, accelerator):
    exe = compiled(dit, cuda_graphs=None)
    wanted = runs(exe, capture=False)
    assert tape == []
    assert all(torch.equal(*pair) for pair in zip(runs(exe, capture=True), wanted, strict=True))
    # One call is made twice in the first run; the others are met again in the second.
    assert len(tape[0].recorded) == 5
    assert len(tape[0].replayed) == 1 + STEPS + STEPS
    exact = compiled(dit, cuda_graphs=None, exact=True)
    runs(exact, capture=True)
    assert len(tape) == 1


def test_samples_second_run_is_captured_as_a_whole(dit, tape, accelerator, caplog):
    scheduler, given = DDIM(clip_sample=False), labels(1, 2)
    exe = sg.compile(dit, planned(dit, scheduler), inputs(2), backend="eager")
    wanted = sg.sample(exe, scheduler, noise(2), capture=False, **given)
    for recorded in (0, 2, 2):
        assert torch.equal(sg.sample(exe, scheduler, noise(2), **given), wanted)
        assert len(tape[0].recorded if tape else []) == recorded
    # What cannot be captured as a whole is captured step by step; the caller knows why.
    for recorded in (3, 7, 7):
        assert torch.equal(sg.sample(exe, scheduler, noise(2), **given, on_step=lambda done, steps: None), wanted)
        assert len(tape[0].recorded) == recorded
    assert "not captured" not in caplog.text


def test_slots_hold_what_is_planned(dit):
    exe = compiled(dit)
    for session in (exe.session(capture=False), exe.session()):
        run_loop(session, DDIM(), noise(2), STEPS, 1.0, labels(1, 2), None)
        assert session.peak_slot_bytes == exe.memory().peak_slot_bytes
        assert session.slot_bytes == 0


def test_weights_that_moved_are_captured_anew(tape):
    model = tiny_dit()
    exe = compiled(model)
    before = runs(exe, capture=True)
    model.proj_out_2.weight.data = model.proj_out_2.weight.data * 2
    after = runs(exe, capture=True)
    assert len(tape[0].recorded) == 10
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(*pair) for pair in zip(after, runs(exe, capture=False), strict=True))


# -- declined --------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_captured_is_refused_where_it_was_asked_for(dit, monkeypatch):
    exe = compiled(dit)
    with monkeypatch.context() as patch:
        patch.setenv("STEPGRAPH_CHECK", "1")
        with pytest.raises(sg.CompileError, match=r"cuda_graphs=True, but STEPGRAPH_CHECK=1 looks.*leave it out"):
            runs(exe, capture=True)
    with monkeypatch.context() as patch:
        patch.delitem(cudagraph.RECORDERS, "cpu")
        with pytest.raises(sg.CompileError, match=r"cuda_graphs=True, but the latents are on cpu; graphs are captured on cuda"):
            runs(exe, capture=True)
    runs(exe, capture=True)


def reading(call):
    return lambda *given: call(*given) if given[0][0].sum().item() < 1e9 else ()


def test_a_host_read_is_refused_or_leaves_the_run_as_it_was(dit, caplog, accelerator):
    exe = with_calls(compiled(dit), reading)
    with pytest.raises(sg.CompileError, match="the step cannot be captured: item while recording"):
        runs(exe, capture=True)
    wanted = runs(exe, capture=False)
    lazy = with_calls(compiled(dit, cuda_graphs=None), reading)
    with caplog.at_level("WARNING", logger="stepgraph.capture"):
        got = runs(lazy, capture=True)
    assert caplog.text.count("not captured: the step cannot be captured: item while recording") == 1
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_a_tape_is_a_recorder():
    recorder: cudagraph.Recorder = Tape()
    assert recorder.warm_up(lambda: 3) == 3
