"""Attached, nothing is read from the device between the first step and the last: on a CPU that counts as an accelerator."""

import contextlib

import pytest
import torch

import stepgraph as sg
from helpers.pipes import STEPS, images, tiny_pipe
from helpers.tape import no_host_reads
from helpers.text_pipes import flux_example, flux_pipe, latents
from helpers.tiny import inputs, tiny_dit


def flux_latents(pipe) -> torch.Tensor:
    return latents(pipe, num_inference_steps=STEPS)


# The pipeline, how guidance calls its transformer, its inputs and a run: DiT's gives views of its scheduler's timesteps, FLUX's
# computes them.
PIPES = {
    "dit": (lambda: tiny_pipe(tiny_dit()), "batched", lambda pipe: inputs(2), images),
    "flux": (flux_pipe, "none", flux_example, flux_latents),
}


@contextlib.contextmanager
def guarded(transformer, from_step: int):
    """Refuse host reads within calls of the transformer from a step on, up to the last but one; the list grows by each call."""
    calls, guards = [], contextlib.ExitStack()

    def before(*_):
        calls.append(len(calls))
        if from_step <= calls[-1] < STEPS - 1:
            guards.enter_context(no_host_reads())

    transformer.register_forward_pre_hook(before)
    transformer.register_forward_hook(lambda *_: guards.close())
    with guards:
        yield calls


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("graphs", [None, False])
@pytest.mark.parametrize("name", PIPES)
def test_no_call_between_the_ends_waits(name, graphs, inference, tape, accelerator):
    make, guidance, example, call = PIPES[name]
    pipe = make()
    plan = sg.make_plan(
        "interval", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS, guidance=guidance, every=2,
        example_inputs=example(pipe),
    )  # fmt: skip
    sg.compile(pipe.transformer, plan, example(pipe), backend="eager", cuda_graphs=graphs).attach(pipe)
    with torch.inference_mode(inference):
        # Captured in the second run at the latest.
        wanted, _ = call(pipe), call(pipe)
        replayed = len(tape[0].replayed) if tape else 0
        with guarded(pipe.transformer, from_step=1) as calls:
            assert torch.equal(call(pipe), wanted)
    assert len(calls) == STEPS
    assert bool(tape) == (graphs is None)
    if tape:
        assert len(tape[0].replayed) == replayed + STEPS


def test_what_waits_would_be_seen(pipe):
    """The guard is no stand-in for nothing: a call that reads is refused."""
    with guarded(pipe.transformer, from_step=1) as calls:
        pipe.transformer.register_forward_pre_hook(lambda module, given: None if given[0].sum().item() else given)
        with pytest.raises(RuntimeError, match="item while recording"):
            images(pipe)
    assert len(calls) == 2
