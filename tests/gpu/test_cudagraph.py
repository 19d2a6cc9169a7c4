"""Captured runs and steps on a CUDA device: what the loop gives, no waiting, no growth. Deselected by default; `-m gpu`."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import stepgraph as sg
from helpers.captures import EACH_UPDATE, SCHEDULERS, STEPS, planned, two_prompts, with_calls
from helpers.corrections import factors_of, maps_of
from helpers.distance import SAME_REPLAY, error
from helpers.pipes import tiny_pipe
from helpers.tiny import inputs, labels, noise, tiny_dit
from stepgraph.fingerprint import model_dtype
from stepgraph.runtime.capture.captured_steps import CapturedSteps
from stepgraph.runtime.program.bound_weights import Look
from stepgraph.runtime.sampling.captured_run import CapturedRun
from stepgraph.tolerances import REPLAY, tolerance

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def dit():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return tiny_dit().cuda()


def on_cuda(given: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {name: value.to("cuda", dtype if value.is_floating_point() else None) for name, value in given.items()}


def compiled(dit, scheduler, guidance="none", **options) -> sg.Executable:
    rows = on_cuda(inputs(4 if guidance == "batched" else 2), next(dit.parameters()).dtype)
    return sg.compile(dit, planned(dit, scheduler, guidance=guidance), rows, **({"backend": "eager"} | options))


def assert_same(exe, scheduler, scale=1.0):
    """The whole run as one graph, its steps as graphs, and every kernel launched."""
    wanted = two_prompts(exe, scheduler, scale, capture=False)
    whole = two_prompts(exe, scheduler, scale, capture=True)
    assert any(isinstance(kept.capture, CapturedRun) for kept in exe.captured._attempts.values())
    steps = [result for _ in range(2) for result in two_prompts(exe, scheduler, scale, on_step=lambda done, total: None)]
    captured = [kept.capture for kept in exe.captured._attempts.values() if isinstance(kept.capture, CapturedSteps)]
    assert captured
    assert all(kept._steps and not kept.refused for kept in captured)
    for got, expected in zip([*whole, *steps], wanted * 3, strict=True):
        assert (got - expected).float().norm() <= tolerance(REPLAY, model_dtype(exe.model)) * expected.float().norm()
    assert not torch.equal(wanted[0], wanted[1])


@EACH_UPDATE
def test_captured_runs_and_steps_are_the_loop(dit, name, guidance, scale):
    scheduler = SCHEDULERS[name]()
    assert_same(compiled(dit, scheduler, guidance), scheduler, scale)


@pytest.mark.parametrize("regions", [True, False])
def test_compiled_regions_are_captured(dit, regions):
    scheduler = SCHEDULERS["ddim"]()
    assert_same(compiled(dit, scheduler, backend="inductor", regions=regions), scheduler)


def test_triton_operations_are_captured(dit, monkeypatch):
    monkeypatch.setenv("STEPGRAPH_PROVIDERS", "triton")
    scheduler = SCHEDULERS["dpm++"]()
    exe = compiled(dit, scheduler)
    assert exe.providers()
    assert all(name.endswith("by triton") for name in exe.providers())
    assert_same(exe, scheduler)


def test_bfloat16_is_captured():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scheduler = SCHEDULERS["ddim"]()
    assert_same(compiled(tiny_dit().cuda().bfloat16(), scheduler), scheduler)


def test_forecasts_and_increments_are_captured(dit):
    scheduler = SCHEDULERS["ddim"]()
    forecast = sg.forecast(planned(dit, scheduler), order=1)
    assert_same(sg.compile(dit, forecast, on_cuda(inputs(2)), backend="eager"), scheduler)
    maps = {name: (a.cuda(), b.cuda()) for name, (a, b) in maps_of(dit).items()}
    factors = factors_of(dit, maps)
    plan = planned(dit, scheduler, {"attn": "CLCLCL", "ff": "CRLRCL"})
    plan = replace(plan, header=replace(plan.header, factors=factors.digest))
    assert_same(sg.compile(dit, plan, on_cuda(inputs(2)), backend="eager", factors=factors), scheduler)


def test_memory_does_not_grow_over_replays(dit):
    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, scheduler)
    for options in ({"capture": True}, {"on_step": lambda done, total: None}):
        for _ in range(2):
            two_prompts(exe, scheduler, **options)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(20):
            two_prompts(exe, scheduler, **options)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("graphs", [True, None, False])
def test_after_warming_up_the_device_allocates_no_segment(dit, graphs):
    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, scheduler, cuda_graphs=graphs)
    warmed = exe.warm_up(scheduler)
    assert warmed.captured == ("" if graphs is False else "run")
    given, start = on_cuda(labels(1, 2)), noise(2).cuda()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for _ in range(3):
        sg.sample(exe, scheduler, start, **given)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replayed_run_waits_for_nothing(dit):
    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, scheduler)
    given = on_cuda(labels(1, 2))
    wanted = sg.sample(exe, scheduler, noise(2).cuda(), capture=True, **given)
    run = next(kept.capture for kept in exe.captured._attempts.values() if isinstance(kept.capture, CapturedRun))
    start, other = noise(2).cuda(), on_cuda(labels(5, 6))
    with no_waiting():
        again = run(start, [given], Look())
        run(start, [other], Look())
    assert error(again, wanted) <= SAME_REPLAY


@pytest.mark.parametrize("graphs", [True, False])
def test_the_loop_waits_at_its_ends_only(dit, graphs):
    """From the second step to the last but one, nothing of `sample` synchronises."""
    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, scheduler, cuda_graphs=graphs)
    given, start = on_cuda(labels(1, 2)), noise(2).cuda()

    def guarded(done: int, total: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if done < total - 1 else "default")

    for on_step in (lambda done, total: None, guarded):
        try:
            got = sg.sample(exe, scheduler, start, on_step=on_step, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert error(got, sg.sample(exe, scheduler, start, capture=False, **given)) <= SAME_REPLAY


@pytest.mark.parametrize("graphs", [True, False])
def test_an_attached_transformer_waits_at_a_runs_ends_only(dit, graphs):
    pipe = tiny_pipe(dit)

    def images() -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(0)
        return pipe([1], num_inference_steps=STEPS, generator=generator, output_type="pt").images

    exe = compiled(dit, pipe.scheduler, cuda_graphs=graphs).attach(pipe)
    wanted, calls = images(), []

    def before(*_) -> None:
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if 1 < len(calls) < STEPS else "default")

    hooks = [
        dit.register_forward_pre_hook(before),
        dit.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")),
    ]
    try:
        assert error(images(), wanted) <= SAME_REPLAY
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for hook in hooks:
            hook.remove()
        exe.detach()
    assert len(calls) == STEPS


def test_a_host_read_is_declined_and_the_device_stays_usable(dit):
    scheduler = SCHEDULERS["ddim"]()
    exe = compiled(dit, scheduler)
    wanted = two_prompts(exe, scheduler, capture=False)

    def reading(call):
        return lambda *given: call(*given) if given[0][0].sum().item() < 1e9 else ()

    other = with_calls(exe, reading)
    with pytest.raises(sg.CompileError, match="capture=True, but the run cannot be captured"):
        two_prompts(other, scheduler, capture=True)
    for _ in range(2):
        got = two_prompts(other, scheduler)
        assert all(error(one, expected) <= SAME_REPLAY for one, expected in zip(got, wanted, strict=True))
    # The recorder that failed, the allocator, the generator and the stream are as before.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert bool(torch.randn(8, device="cuda").isfinite().all())
    recorder, held = other.captured.recorder(torch.device("cuda", torch.cuda.current_device())), torch.zeros(4, device="cuda")
    with recorder.turn():
        replay = recorder.record(lambda: held.add_(1))
        held.zero_()
        replay()
    assert held.tolist() == [1.0] * 4
    assert_same(exe, scheduler)
