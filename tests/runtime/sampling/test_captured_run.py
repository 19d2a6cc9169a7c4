"""Captured runs, on a tape that stands for a CUDA graph: they give what the loop gives, or say why they are not there."""

import threading
from dataclasses import replace

import diffusers
import pytest
import torch
from torch.overrides import TorchFunctionMode

import stepgraph as sg
from helpers.captures import EACH_UPDATE, REUSED, SCHEDULERS, STEPS, planned, two_prompts, with_calls
from helpers.corrections import factors_of, maps_of
from helpers.distance import SAME_RUN, error
from helpers.oracle import Oracle, run_loop
from helpers.tape import HostReadError, Tape
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_dit
from stepgraph.errors import CompileError
from stepgraph.runtime.capture import cudagraph
from stepgraph.runtime.capture.captured import Attempt, Captured

NULL = {"negative_class_labels": torch.tensor([NULL_CLASS, NULL_CLASS])}


def compiled(dit, scheduler, actions=REUSED, guidance="none", **options) -> sg.Executable:
    rows = 4 if guidance == "batched" else 2
    return sg.compile(dit, planned(dit, scheduler, actions, guidance), inputs(rows), **({"backend": "eager"} | options))


def assert_same(exe, scheduler, scale=1.0):
    """Captured and not: the same bits, as the tape runs the same operations."""
    wanted, got = (two_prompts(exe, scheduler, scale, capture=capture) for capture in (False, True))
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
    assert torch.equal(got[0], got[2])
    assert not torch.equal(got[0], got[1])


@EACH_UPDATE
def test_a_captured_run_is_the_loop(dit, tape, name, guidance, scale):
    scheduler = SCHEDULERS[name]()
    assert_same(compiled(dit, scheduler, guidance=guidance), scheduler, scale)
    # One capture of the tables and one of the run, and nothing is left to the scheduler's own step.
    assert [len(one.recorded) for one in tape] == [2]
    assert tape[0].replayed == [0, 1] * 4


def test_a_captured_run_is_the_oracle(dit):
    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, scheduler)
    got = two_prompts(exe, scheduler, capture=True)[1]
    wanted = run_loop(Oracle.of(dit, exe.plan), scheduler, noise(2, 1), STEPS, 1.0, labels(3, 4), None)[0]
    assert error(got, wanted) <= SAME_RUN


def test_modes_around_are_neither_captured_nor_left_out(dit):
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result * 2 if func is torch.nn.functional.layer_norm else result

    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, scheduler)
    for _ in range(2):
        with Doubled(), pytest.raises(CompileError, match="Doubled stands around the call"):
            sg.sample(exe, scheduler, noise(2), capture=True, **labels(1, 2))
        assert_same(exe, scheduler)


def test_forecasts_increments_and_narrow_slots_are_captured(dit):
    scheduler = SCHEDULERS["dpm++"]()
    forecast = sg.forecast(planned(dit, scheduler), order=1)
    assert "F" in "".join(forecast.rows)
    exe = sg.compile(dit, forecast, inputs(2), backend="eager", slot_dtype="bfloat16")
    assert_same(exe, scheduler)
    factors = factors_of(dit, maps_of(dit))
    plan = planned(dit, scheduler, {"attn": "CLCLCL", "ff": "CRLRCL"})
    plan = replace(plan, header=replace(plan.header, factors=factors.digest))
    assert_same(sg.compile(dit, plan, inputs(2), backend="eager", factors=factors), scheduler)


@pytest.mark.parametrize("options", [{"hoist": False}, {"hoist_limit_mb": 0.0}])
def test_without_tables_everything_is_in_the_run(dit, options):
    scheduler = SCHEDULERS["ddim"]()
    assert_same(compiled(dit, scheduler, **options), scheduler)


def test_exact_tables_are_computed_step_by_step(dit):
    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, scheduler, exact=True)
    wanted, got = (two_prompts(exe, scheduler, fused_update=True, capture=capture) for capture in (False, True))
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_a_replay_follows_conditioning_however_it_is_written(dit, tape):
    scheduler, given = SCHEDULERS["ddim"](), labels(1, 2)
    exe = compiled(dit, scheduler)
    results = [sg.sample(exe, scheduler, noise(2, seed), capture=True, **given) for seed in (0, 1, 0)]
    assert torch.equal(results[0], results[2])
    with torch.inference_mode():
        unversioned = labels(1, 2)
        assert torch.equal(sg.sample(exe, scheduler, noise(2), capture=True, **unversioned), results[0])
    # Without a version, by one, and past it.
    with torch.inference_mode():
        unversioned["class_labels"].fill_(6)
    given["class_labels"].fill_(7)
    for value, written in ((6, unversioned), (7, given), (8, given)):
        written["class_labels"].data.fill_(value)
        changed = sg.sample(exe, scheduler, noise(2), capture=True, **written)
        assert torch.equal(changed, sg.sample(exe, scheduler, noise(2), **labels(value, value)))
    # Tables and run, at the capture and in each of the calls.
    assert tape[0].replayed == [0, 1] * 8


def test_a_captured_run_reads_the_weights_as_they_are(tape):
    model, scheduler = tiny_dit(), SCHEDULERS["ddim"]()
    exe = compiled(model, scheduler)
    before = sg.sample(exe, scheduler, noise(2), capture=True, **labels(1, 2))
    with torch.no_grad():
        model.proj_out_2.weight.mul_(2)
    written = sg.sample(exe, scheduler, noise(2), capture=True, **labels(1, 2))
    assert len(tape[0].recorded) == 2
    assert torch.equal(written, sg.sample(exe, scheduler, noise(2), **labels(1, 2)))
    # Weights that lie elsewhere are captured anew.
    model.proj_out_2.weight.data = model.proj_out_2.weight.data / 2
    moved = sg.sample(exe, scheduler, noise(2), capture=True, **labels(1, 2))
    assert len(tape[0].recorded) == 4
    assert torch.equal(moved, before)
    assert not torch.equal(moved, written)


def test_tables_follow_the_weights_they_are_made_of(tape):
    """The conditioning is the same tensors in all runs; the weight is read by tables alone."""
    model, scheduler, given = tiny_dit(), SCHEDULERS["ddim"](), labels(1, 2)
    exe = compiled(model, scheduler)
    before = sg.sample(exe, scheduler, noise(2), capture=True, **given)
    with torch.no_grad():
        model.transformer_blocks[0].norm1.linear.weight.mul_(3)
    written = sg.sample(exe, scheduler, noise(2), capture=True, **given)
    assert len(tape[0].recorded) == 2
    assert not torch.equal(written, before)
    assert torch.equal(written, sg.sample(exe, scheduler, noise(2), **given))


def test_a_captured_run_follows_strengths(tape):
    model, scheduler, given = tiny_dit(), SCHEDULERS["ddim"](), labels(1, 2)
    norm, attention = model.transformer_blocks[0].norm1, model.transformer_blocks[1].attn1
    # One is read by tables alone, one in the loop.
    norm.linear, attention.to_v = Scaled(norm.linear).eval(), Scaled(attention.to_v).eval()
    exe = compiled(model, scheduler)
    results = [sg.sample(exe, scheduler, noise(2), capture=True, **given)]
    for part in (norm.linear, attention.to_v):
        part.strength = 0.25
        results.append(sg.sample(exe, scheduler, noise(2), capture=True, **given))
        assert torch.equal(results[-1], sg.sample(exe, scheduler, noise(2), **given))
        assert not torch.equal(*results[-2:])
    assert len(tape[0].recorded) == 2


class Scaled(torch.nn.Module):
    """A layer times a number."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.strength = layer, 1.5

    def forward(self, x):
        return self.layer(x) * self.strength


def test_off_loading_is_declined(dit):
    scheduler = SCHEDULERS["ddim"]()
    with pytest.raises(sg.CompileError, match="capture=True, but offload=True copies values on a stream of its own"):
        sg.sample(compiled(dit, scheduler, offload=True), scheduler, noise(2), capture=True, **labels(1, 2))


def test_scales_and_shapes_are_captures_of_their_own_and_the_oldest_makes_room(dit, tape):
    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, scheduler, {"ff": "CRCRCR"}, "batched")
    for scale in (2.0, 3.0, 4.0, 5.0, 6.0, 6.0, 5.0, 2.0):
        got = sg.sample(exe, scheduler, noise(2), scale, capture=True, **labels(1, 2), **NULL)
        assert torch.equal(got, sg.sample(exe, scheduler, noise(2), scale, **labels(1, 2), **NULL))
    # Five scales, of which four are kept: the first is captured again.
    assert len(tape[0].recorded) == 2 * 6


def test_threads_take_turns(dit):
    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, scheduler)
    wanted = {seed: sg.sample(exe, scheduler, noise(2, seed), **labels(seed, 2)) for seed in range(4)}
    got = {}

    def run(seed: int):
        got[seed] = [sg.sample(exe, scheduler, noise(2, seed), capture=True, **labels(seed, 2)) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, wanted[seed]) for seed in wanted for result in got[seed])


# -- declined --------------------------------------------------------------------------------------------------------------


def clipping(monkeypatch):
    return diffusers.DDIMScheduler(), {}


def watched(monkeypatch):
    return SCHEDULERS["ddim"](), {"on_step": lambda done, steps: None}


def unfused(monkeypatch):
    return SCHEDULERS["ddim"](), {"fused_update": False}


def checked(monkeypatch):
    monkeypatch.setenv("STEPGRAPH_CHECK", "1")
    return SCHEDULERS["ddim"](), {}


def on_a_cpu(monkeypatch):
    monkeypatch.delitem(cudagraph.RECORDERS, "cpu")
    return SCHEDULERS["ddim"](), {}


DECLINED = {
    clipping: "DDIMScheduler is no fixed linear combination.*clip_sample=True",
    watched: "on_step is called on the host after every step",
    unfused: "the scheduler takes its own steps, on the host",
    checked: "STEPGRAPH_CHECK=1 looks at every step's values",
    on_a_cpu: "the latents are on cpu; graphs are captured on cuda",
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_cannot_be_captured_is_declined(dit, tape, monkeypatch, case):
    scheduler, options = case(monkeypatch)
    exe = compiled(dit, scheduler)
    with pytest.raises(sg.CompileError, match=f"capture=True, but .*{DECLINED[case]}.*leave it out to run the loop"):
        sg.sample(exe, scheduler, noise(2), capture=True, **labels(1, 2), **options)
    assert tape == []
    sg.sample(exe, scheduler, noise(2), **labels(1, 2), **options)


def test_graphs_as_compiled_are_those_of_steps_where_the_host_is_called(dit, tape):
    """`cuda_graphs=True` asks for graphs, and `capture=True` for that of the whole run."""
    scheduler, done = SCHEDULERS["ddim"](), []
    exe = compiled(dit, scheduler, cuda_graphs=True)
    got = sg.sample(exe, scheduler, noise(2), on_step=lambda step, steps: done.append(step), **labels(1, 2))
    assert done == list(range(1, STEPS + 1))
    assert len(tape[0].replayed) == STEPS
    assert torch.equal(got, sg.sample(exe, scheduler, noise(2), capture=False, **labels(1, 2)))
    with pytest.raises(sg.CompileError, match="capture=True, but on_step is called on the host"):
        sg.sample(exe, scheduler, noise(2), capture=True, on_step=lambda step, steps: None, **labels(1, 2))


def test_models_nested_tensors_and_autocast_are_declined(dit):
    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, scheduler)
    with pytest.raises(sg.CompileError, match="DiTTransformer2DModel is not compiled"):
        sg.sample(dit, scheduler, noise(2), steps=STEPS, capture=True, **labels(1, 2))
    with pytest.raises(sg.CompileError, match="the input cross_attention_kwargs is a dict that holds tensors"):
        sg.sample(exe, scheduler, noise(2), capture=True, **labels(1, 2), cross_attention_kwargs={"scale": torch.ones(1)})
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(sg.CompileError, match="capture=True, but autocast is on"):
        sg.sample(exe, scheduler, noise(2), capture=True, **labels(1, 2))


def test_a_model_that_reads_on_the_host_is_declined_and_stays_so(dit, tape):
    def reading(call):
        return lambda *given: call(*given) if given[0][0].sum().item() < 1e9 else ()

    scheduler = SCHEDULERS["ddim"]()
    exe = with_calls(compiled(dit, scheduler), reading)
    for _ in range(2):
        with pytest.raises(sg.CompileError, match="capture=True, but the run cannot be captured: item while recording"):
            sg.sample(exe, scheduler, noise(2), capture=True, **labels(1, 2))
    assert len(tape[0].recorded) == 1
    sg.sample(exe, scheduler, noise(2), **labels(1, 2))


def test_a_run_that_depends_on_python_is_declined(dit):
    """The comparison finds it: the loop that is captured is another than the one before."""
    count = [0]

    def counting(call):
        def counted(*given):
            count[0] += 1
            return tuple(value * (1 + 1e-3 * count[0]) for value in call(*given))

        return counted

    scheduler = SCHEDULERS["ddim"]()
    exe = with_calls(compiled(dit, scheduler), counting)
    with pytest.raises(sg.CompileError, match=r"a replay of the captured run differs from the loop by .* of its norm"):
        sg.sample(exe, scheduler, noise(2), capture=True, **labels(1, 2))


def test_without_a_wish_the_second_run_is_captured():
    """What runs once does not pay; and what was declined is not tried again."""
    made, captured = [], Captured()

    def make() -> str | list[int]:
        made.append(1)
        return [1]

    def refuse() -> list[int]:
        made.append(2)
        raise cudagraph.CaptureError("no")

    assert captured.obtain(("run", "a"), make, bool, at_once=False) == Attempt()
    assert captured.obtain(("run", "a"), make, bool, at_once=False) == Attempt([1])
    assert captured.obtain(("run", "b"), refuse, bool, at_once=True) == Attempt(refusal="no")
    assert captured.obtain(("run", "b"), refuse, bool, at_once=True) == Attempt(refusal="no")
    assert made == [1, 2]


def test_the_tape_keeps_what_python_decided_and_refuses_host_reads():
    x, out = torch.tensor([3.0, 1.0]), torch.zeros(2)
    tape, factor = Tape(), 2.0
    replay = tape.record(lambda: out.copy_((x * factor).flip(0) + x[0]))
    factor = 5.0
    x.copy_(torch.tensor([1.0, 10.0]))
    replay()
    assert out.tolist() == [21.0, 3.0]
    reads = [
        lambda: x.sum().item(), lambda: bool(x[0] > 1), lambda: x.tolist(), lambda: torch.equal(x, x), lambda: x.cpu(),
        lambda: x.nonzero(), lambda: torch.tensor([1.0]), lambda: float(x[0]), lambda: x.numpy(),
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(HostReadError):
            tape.record(read)


def test_the_tape_runs_work_once_more_before_it_records_it():
    tape, passes = Tape(), []
    tape.record(lambda: passes.append(1))
    assert passes == [1, 1]


def test_the_tape_refuses_what_outlives_the_recording():
    x, held, out = torch.ones(2), [], torch.zeros(2)
    keeps = [lambda: held.append(x + 1), lambda: held.append((x * 2)[:1]), lambda: held.append((x - 1).numpy)]
    for keep in keeps:
        with pytest.raises(RuntimeError, match=r"a tensor \[2\] that was allocated while recording is held afterwards"):
            Tape().record(keep)
        held.clear()
    # What was there before may be held, and so may the recording's own result until it ends.
    Tape().record(lambda: held.append(out.copy_(x + 1)[:1]))


def test_the_tape_refuses_streams_that_are_not_joined():
    x, out = torch.ones(2), torch.zeros(2)

    def beside(fork: bool, join: bool):
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        if fork:
            side.wait_stream(current)
        with torch.cuda.stream(side):
            out.copy_(x * 2)
        if join:
            current.wait_stream(side)

    tape = Tape()
    # The first pass is no recording; there are no streams here.
    tape.warm_up = lambda run: None
    tape.record(lambda: beside(True, True))()
    assert out.tolist() == [2.0, 2.0]
    with pytest.raises(RuntimeError, match="a stream that is not joined at the end of the recording"):
        tape.record(lambda: beside(True, False))
    with pytest.raises(RuntimeError, match="a stream that does not wait for the recording's"):
        tape.record(lambda: beside(False, True))


def test_the_tape_knows_the_default_generator_alone():
    x, out = torch.empty(2), torch.zeros(2)
    replay = Tape().record(lambda: out.copy_(x.normal_()))
    replay()
    first = out.tolist()
    replay()
    # As on a device, a replay goes on with the generator.
    assert out.tolist() != first
    with pytest.raises(RuntimeError, match="normal_ with a generator that is not registered"):
        Tape().record(lambda: x.normal_(generator=torch.Generator()))
