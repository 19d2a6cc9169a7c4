"""Graphs without a wish, on a CPU that counts as an accelerator: what changes around them is followed, and said once."""

import threading

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.captures import REUSED, SCHEDULERS, STEPS, planned, with_calls
from helpers.oracle import run_loop
from helpers.tape import Tape
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_dit
from stepgraph.config import CompileConfig
from stepgraph.runtime.capture import cudagraph
from stepgraph.runtime.capture.captured import LIMITS
from stepgraph.runtime.sampling.captured_run import CapturedRun
from stepgraph.runtime.session import compiled as sessions

DDIM = SCHEDULERS["ddim"]
BUSY = "another run has the graphs of these calls, and has not ended"
NULL = {"negative_class_labels": torch.tensor([NULL_CLASS, NULL_CLASS])}


def compiled(model, guidance="none", **options) -> sg.Executable:
    rows = 4 if guidance == "batched" else 2
    return sg.compile(model, planned(model, DDIM(), guidance=guidance), inputs(rows), backend="eager", **options)


def sampled(exe, scheduler=None, batch: int = 2, **options) -> torch.Tensor:
    torch.manual_seed(0)
    return sg.sample(exe, scheduler or DDIM(), noise(batch), **labels(*range(batch)), **options)


def stepped(exe, capture: bool = True) -> torch.Tensor:
    return run_loop(exe.session(capture), DDIM(), noise(2), STEPS, 1.0, labels(0, 1), None)[0]


def said(caplog) -> list[str]:
    """What the log says of captures that is a warning."""
    records = [record for record in caplog.records if record.name == "stepgraph.capture"]
    return [record.getMessage() for record in records if record.levelname == "WARNING"]


def assert_is_the_loop(exe, scheduler=None, times: int = 3, **options) -> None:
    wanted = sampled(exe, scheduler, capture=False, **options)
    for _ in range(times):
        assert torch.equal(sampled(exe, scheduler, **options), wanted)


def test_a_cpu_has_no_graphs_and_nothing_is_said(dit, tape, caplog, monkeypatch):
    assert CompileConfig().cuda_graphs is None
    exe = compiled(dit)
    monkeypatch.delitem(cudagraph.RECORDERS, "cpu")
    with caplog.at_level("DEBUG", logger="stepgraph.capture"):
        assert_is_the_loop(exe)
        assert exe.warm_up(DDIM()).captured == exe.warm_up().captured == ""
    assert exe.captured.captures() == tape == []
    assert not [record for record in caplog.records if record.name == "stepgraph.capture"]


def test_an_accelerator_without_graphs_has_none(dit, accelerator, caplog, monkeypatch):
    monkeypatch.delitem(cudagraph.RECORDERS, "cpu")
    assert_is_the_loop(compiled(dit))
    assert said(caplog) == []


# -- declined --------------------------------------------------------------------------------------------------------------


class Still(Tape):
    """A recorder whose replays do nothing."""

    def record(self, run):
        super().record(run)
        return lambda: None


class Full(Tape):
    """A device whose memory is out."""

    def record(self, run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


WRONG = {
    Still: [
        "not captured: a replay of the captured run differs from the loop by 1.0e+00 of its norm",
        "not captured: a replay of the captured step differs from the loop by 1.0e+00 of its norm",
    ],
    Full: [
        "not captured: the run cannot be captured: CUDA out of memory",
        "not captured: the step cannot be captured: CUDA out of memory",
    ],
}


@pytest.mark.parametrize("recorder", WRONG)
def test_a_capture_that_is_wrong_or_fails_is_declined_once(dit, accelerator, caplog, monkeypatch, recorder):
    monkeypatch.setitem(cudagraph.RECORDERS, "cpu", recorder)
    exe = compiled(dit)
    assert_is_the_loop(exe, times=4)
    assert [line[: len(start)] for line, start in zip(said(caplog), WRONG[recorder], strict=True)] == WRONG[recorder]
    assert not any(isinstance(one, CapturedRun) for one in exe.captured.captures())


def test_a_call_without_memory_for_its_values_is_declined(dit, accelerator, caplog, monkeypatch):
    exe = compiled(dit)
    wanted = stepped(exe, capture=False)

    def out_of_memory(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(cudagraph.RECORDERS, "cpu", out_of_memory)
    for _ in range(2):
        assert torch.equal(stepped(exe), wanted)
    assert said(caplog) == ["not captured: CUDA out of memory; its kernels are launched one by one"]


def test_a_model_that_is_read_on_the_host_runs_as_before(dit, accelerator, caplog):
    exe = with_calls(compiled(dit), lambda call: lambda *given: call(*given) if given[0][0].sum().item() < 1e9 else ())
    assert_is_the_loop(exe, times=4)
    whole, step = said(caplog)
    assert whole == "not captured: the run cannot be captured: item while recording; a run of sample is a loop, not one graph"
    assert step == "not captured: the step cannot be captured: item while recording; its kernels are launched one by one"


def test_ancestral_samplers_are_loops_of_captured_steps(dit, tape, accelerator, caplog):
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    plan = sg.make_plan(
        "manual", model=dit, scheduler=scheduler, steps=STEPS, actions=REUSED, guidance="none", allow_stochastic=True
    )
    exe = sg.compile(dit, plan, inputs(2), backend="eager")
    assert_is_the_loop(exe, scheduler)
    (line,) = said(caplog)
    assert "EulerAncestralDiscreteScheduler is no fixed linear combination" in line
    assert line.endswith("it draws random numbers, as ancestral samplers do; a run of sample is a loop, not one graph")
    assert len(tape[0].recorded) == 5
    with pytest.raises(sg.CompileError, match=r"capture=True, but .*it draws random numbers"):
        sampled(exe, scheduler, capture=True)


def test_checked_runs_launch_every_kernel(dit, tape, accelerator, caplog, monkeypatch):
    exe = compiled(dit)
    with monkeypatch.context() as patch:
        patch.setenv("STEPGRAPH_CHECK", "1")
        assert_is_the_loop(exe)
        assert torch.equal(stepped(exe), stepped(exe, capture=False))
    assert tape == []
    (line,) = said(caplog)
    assert line.startswith("not captured: STEPGRAPH_CHECK=1 looks at every step's values on the host")
    assert_is_the_loop(exe)
    assert len(tape[0].recorded) == 2


# -- followed --------------------------------------------------------------------------------------------------------------


def test_new_shapes_are_captures_of_their_own(dit, tape, accelerator, caplog):
    exe = compiled(dit)
    with caplog.at_level("INFO", logger="stepgraph.capture"):
        for batch in (2, 3):
            wanted = sampled(exe, batch=batch, capture=False)
            assert all(torch.equal(sampled(exe, batch=batch), wanted) for _ in range(3))
    assert len(tape[0].recorded) == 2 * 2
    lines = [line for line in caplog.messages if line.startswith("captured a run")]
    starts = [f"captured a run of {STEPS} steps from latents [{batch}, 4, 8, 8] in " for batch in (2, 3)]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert said(caplog) == []


def test_a_fused_lora_is_in_the_next_replay(tape, accelerator):
    """As peft fuses one: through `.data`, which no version tells of."""
    model = tiny_dit()
    exe = compiled(model)
    assert_is_the_loop(exe)
    before, recorded = sampled(exe), len(tape[0].recorded)
    weight = model.transformer_blocks[0].attn1.to_q.weight
    lora = torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
    for sign in (1, -1):
        weight.data += sign * lora
        after = sampled(exe)
        assert torch.equal(after, sampled(exe, capture=False))
        assert (after - before).norm() > 1e-2 * before.norm() if sign > 0 else (after - before).norm() < 1e-4 * before.norm()
    assert len(tape[0].recorded) == recorded


def test_captured_steps_follow_inputs_that_are_written_past_their_version(dit, accelerator):
    exe, given = compiled(dit, hoist=False), labels(1, 2)

    def run(capture: bool) -> torch.Tensor:
        return run_loop(exe.session(capture), DDIM(), noise(2), STEPS, 1.0, given, None)[0]

    before = [run(capture=True) for _ in range(3)]
    given["class_labels"].data.fill_(7)
    assert torch.equal(run(capture=True), run(capture=False))
    assert not torch.equal(run(capture=True), before[-1])


def test_runs_at_the_same_time_are_said_once(dit, tape, accelerator, caplog):
    exe = compiled(dit)
    wanted = stepped(exe, capture=False)
    for _ in range(2):
        holds = exe.session()
        holds(**inputs(2, timestep=int(exe.plan.header.timesteps[0])))
        assert torch.equal(stepped(exe), wanted)
        holds.reset()
    (line,) = said(caplog)
    assert line == f"not captured: {BUSY}; meanwhile its kernels are launched one by one"
    assert torch.equal(stepped(exe), wanted)


@pytest.mark.parametrize("run", [sampled, stepped])
def test_threads_get_what_one_after_the_other_gets(dit, accelerator, run):
    exe = compiled(dit)
    wanted, got = run(exe, capture=False), []
    threads = [threading.Thread(target=lambda: got.extend(run(exe) for _ in range(3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 12
    assert all(torch.equal(result, wanted) for result in got)


# -- bounds ----------------------------------------------------------------------------------------------------------------


def test_captured_runs_share_memory_and_the_last_are_kept(dit, accelerator):
    exe = compiled(dit, guidance="batched")
    held = []
    for scale in range(2, 2 + LIMITS["run"] + 2):
        for _ in range(2):
            sg.sample(exe, DDIM(), noise(2), float(scale), **labels(1, 2), **NULL)
        held.append(exe.captured.nbytes)
    # The first pays for the stored values; each has tables, latents, their result, and classes of both halves.
    each = exe.memory().table_bytes + 2 * noise(2).nbytes + 4 * 8
    most = LIMITS["run"]
    assert held == [exe.memory().arena_bytes + each * count for count in (*range(1, most + 1), most, most)]


def test_programs_and_captures_of_the_last_shapes_are_kept(dit, tape, accelerator, monkeypatch):
    monkeypatch.setattr(sessions, "SIGNATURES", 2)
    exe = compiled(dit)
    under_way = exe.session()
    first = under_way(**inputs(1, timestep=int(exe.plan.header.timesteps[0]))).sample
    for batch in (3, 4, 5):
        for _ in range(2):
            sampled(exe, batch=batch)
    # The default's stays; of the others, batches of 1 and 3 have made room.
    assert [program.batch for program in exe.programs] == [2, 4, 5]
    assert [one.programs[0].batch for one in exe.captured.captures()] == [4, 5]
    # A run goes on with what it began with.
    for step in range(1, STEPS):
        under_way(**inputs(1, timestep=int(exe.plan.header.timesteps[step])))
    assert under_way.finished
    assert first.isfinite().all()
    assert [program.batch for program in exe.programs] == [2, 4, 5]
    assert torch.equal(sampled(exe, batch=3), sampled(exe, batch=3, capture=False))
    assert [program.batch for program in exe.programs] == [2, 5, 3]
