"""What is warmed up is done: later runs tune nothing, capture nothing and allocate no memory for stored values."""

import pytest
import torch

import stepgraph as sg
from helpers.captures import SCHEDULERS, STEPS, planned, with_calls
from helpers.oracle import run_loop
from helpers.tiny import NULL_CLASS, inputs, labels, noise
from stepgraph.errors import ArgumentError
from stepgraph.runtime import warm_up
from stepgraph.runtime.memory.arena import Arena
from stepgraph.runtime.sampling import sample as sampler
from stepgraph.runtime.session import lease_captured_steps
from stepgraph.tuning import may_tune

NULL = {"negative_class_labels": torch.tensor([NULL_CLASS, NULL_CLASS])}


@pytest.fixture(params=[True, None])
def graphs(request, monkeypatch) -> bool | None:
    """The CPU counts as an accelerator, with a tape for its graphs."""
    for module in (lease_captured_steps, sampler, warm_up):
        monkeypatch.setattr(module, "waits", lambda device: True)
    return request.param


@pytest.fixture
def calls() -> list[bool]:
    """Of every call of a variant, whether kernels may be tuned in it."""
    return []


def compiled(dit, graphs, calls, guidance="none") -> sg.Executable:
    plan = planned(dit, SCHEDULERS["ddim"](), guidance=guidance)
    rows = inputs(4 if guidance == "batched" else 2)
    exe = sg.compile(dit, plan, rows, backend="eager", cuda_graphs=graphs)

    def watched(run):
        return lambda *given: calls.append(may_tune()) or run(*given)

    return with_calls(exe, watched)


def nothing_new(monkeypatch) -> None:
    def refuse(*_):
        pytest.fail("memory is allocated within a run")

    monkeypatch.setattr(Arena, "of", refuse)


@pytest.mark.parametrize(("guidance", "scale"), [("none", None), ("batched", 3.0)])
def test_whole_runs_are_replays_from_the_first_on(dit, tape, graphs, calls, monkeypatch, guidance, scale):
    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, graphs, calls, guidance)
    warmed = exe.warm_up(scheduler, scale)
    assert warmed.captured == "run"
    assert warmed.seconds > 0
    assert warmed.bytes == exe.memory().arena_bytes + exe.memory().table_bytes > 0
    assert calls
    assert all(calls)
    recorded, made = len(tape[0].recorded), len(calls)
    given = {**labels(3, 4), **(NULL if scale else {})}
    with monkeypatch.context() as patch:
        nothing_new(patch)
        got = sg.sample(exe, scheduler, noise(2), scale or 1.0, **given)
    assert (len(tape[0].recorded), len(calls)) == (recorded, made)
    assert torch.equal(got, sg.sample(exe, scheduler, noise(2), scale or 1.0, capture=False, **given))
    assert not any(calls[made:])


def test_calls_of_sessions_are_replays_from_the_first_on(dit, tape, graphs, calls, monkeypatch):
    exe = compiled(dit, graphs, calls)
    warmed = exe.warm_up()
    assert warmed.captured == "steps"
    assert all(calls)
    recorded, made = len(tape[0].recorded), len(calls)
    with monkeypatch.context() as patch:
        nothing_new(patch)
        got = run_loop(exe.session(), SCHEDULERS["ddim"](), noise(2), STEPS, 1.0, labels(1, 2), None)[0]
    assert (len(tape[0].recorded), len(calls)) == (recorded, made)
    wanted = run_loop(exe.session(capture=False), SCHEDULERS["ddim"](), noise(2), STEPS, 1.0, labels(1, 2), None)[0]
    assert torch.equal(got, wanted)


def test_without_graphs_a_run_is_made(dit, caplog):
    plan = planned(dit, SCHEDULERS["ddim"](), guidance="separate")
    exe = sg.compile(dit, plan, inputs(2), backend="eager")
    with caplog.at_level("INFO", logger="stepgraph.executable"):
        assert exe.warm_up(SCHEDULERS["ddim"](), 2.0, **labels(1, 2)).captured == ""
    assert "warmed up in" in caplog.text
    with pytest.raises(ArgumentError, match="guidance_scale is missing: the plan is for guidance"):
        exe.warm_up(SCHEDULERS["ddim"]())
