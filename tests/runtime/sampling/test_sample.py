"""The plain sampling loop: eager and compiled alike, inputs checked, nothing of the caller's changed."""

import copy

import pytest
import torch

import stepgraph as sg
from helpers.distance import SAME_RUN, error
from helpers.oracle import run_loop
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_scheduler
from stepgraph.errors import PlanError
from stepgraph.scheduler import prepare_scheduler, scheduler_facts

NULL = {"negative_class_labels": torch.tensor([NULL_CLASS, NULL_CLASS])}


@pytest.fixture(scope="module")
def executable(dit):
    plan = sg.make_plan("interval", model=dit, scheduler=tiny_scheduler("ddim"), steps=4)
    return sg.compile(dit, plan, inputs(2), backend="eager", exact=True)


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "heun"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_plain_model_is_sampled_like_a_pipeline_would(dit, name, guidance_scale):
    scheduler = tiny_scheduler(name)
    wanted, outputs = run_loop(
        dit, scheduler, noise(2), 3, guidance_scale, labels(1, 2), {"class_labels": NULL["negative_class_labels"]}
    )
    seen = []
    negative = NULL if guidance_scale > 1 else {}
    got = sg.sample(
        dit, scheduler, noise(2), guidance_scale, steps=3, on_step=lambda *p: seen.append(p), **labels(1, 2), **negative
    )
    assert torch.equal(got, wanted)
    assert seen == [(n + 1, len(outputs)) for n in range(len(outputs))]
    assert (got.shape, got.dtype) == ((2, 4, 8, 8), torch.float32)


def test_negative_inputs_without_guidance_are_not_used(dit, ddim):
    plain = sg.sample(dit, ddim, noise(2), steps=2, **labels(1, 2))
    assert torch.equal(sg.sample(dit, ddim, noise(2), 1.0, steps=2, **labels(1, 2), **NULL), plain)


def test_the_scheduler_and_the_noise_keep_their_state(dit, executable):
    scheduler, start = tiny_scheduler("ddim"), noise()
    scheduler.set_timesteps(13)
    before, latents = copy.deepcopy(scheduler.__dict__), start.clone()
    sg.sample(executable, scheduler, start, **labels(1))
    assert torch.equal(scheduler.timesteps, before["timesteps"])
    assert scheduler.num_inference_steps == 13
    assert torch.equal(start, latents)


def test_a_new_batch_size_is_compiled_when_it_comes(dit, executable):
    assert executable.default.batch == 2
    one = sg.sample(executable, tiny_scheduler("ddim"), noise(1), **labels(4))
    assert one.shape[0] == 1
    assert {program.batch for program in executable._programs.values()} >= {1, 2}
    assert torch.equal(sg.sample(executable, tiny_scheduler("ddim"), noise(1), **labels(4)), one)


REFUSED = {
    "steps missing": (
        lambda dit, exe: sg.sample(dit, tiny_scheduler("ddim"), noise()),
        "steps is needed to sample with a plain model",
    ),
    "zero steps": (
        lambda dit, exe: sg.sample(dit, tiny_scheduler("ddim"), noise(), steps=0),
        "steps is 0; expected a whole number",
    ),
    "half a step": (lambda dit, exe: prepare_scheduler(tiny_scheduler("ddim"), 2.5), "steps is 2.5; expected a whole number"),
    "true steps": (lambda dit, exe: prepare_scheduler(tiny_scheduler("ddim"), True), "steps is True"),
    "no uncond": (
        lambda dit, exe: sg.sample(exe, tiny_scheduler("ddim"), noise(), 4.0, **labels(1)),
        "guidance_scale 4.0 needs the unconditional input negative_class_labels",
    ),
    "no cond": (
        lambda dit, exe: sg.sample(
            exe, tiny_scheduler("ddim"), noise(), 4.0, negative_class_labels=NULL["negative_class_labels"]
        ),
        "negative_class_labels is given, but class_labels is not",
    ),
    "missing input": (
        lambda dit, exe: sg.sample(exe, tiny_scheduler("ddim"), noise(3)),
        "the plan is for the tensor inputs .*class_labels",
    ),
    "other steps": (
        lambda dit, exe: sg.sample(exe, tiny_scheduler("ddim"), noise(), steps=5, **labels(1)),
        "compiled for 4 inference steps, asked for 5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sampled_is_refused(dit, executable, case):
    run, message = REFUSED[case]
    with pytest.raises(PlanError, match=message):
        run(dit, executable)


def test_a_separate_plan_needs_guidance(dit, ddim):
    plan = sg.make_plan("full", model=dit, scheduler=ddim, steps=2, guidance="separate")
    exe = sg.compile(dit, plan, inputs(1), backend="eager", exact=True)
    with pytest.raises(PlanError, match="one branch each for cond and uncond; pass guidance_scale above 1"):
        sg.sample(exe, ddim, noise(), **labels(1))


def test_what_is_recorded_of_a_scheduler():
    heun, ddim = (prepare_scheduler(tiny_scheduler(name), 3) for name in ("heun", "ddim"))
    assert len(scheduler_facts(heun)["timesteps"]) == 5
    assert scheduler_facts(ddim)["timesteps"] == tuple(float(t) for t in ddim.timesteps)
    assert scheduler_facts(heun)["scheduler"] == "HeunDiscreteScheduler"
    assert scheduler_facts(heun)["scheduler_hash"] != scheduler_facts(ddim)["scheduler_hash"]
    other = prepare_scheduler(type(ddim)(beta_end=0.03), 3)
    assert scheduler_facts(other)["scheduler_hash"] != scheduler_facts(ddim)["scheduler_hash"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tvm"}, "backend is 'tvm'; expected one of eager, inductor"),
        ({"exact": True}, "exact=True keeps the eager operations, but backend is 'inductor'"),
    ],
)
def test_compile_options_are_checked(dit, executable, options, message):
    with pytest.raises(ValueError, match=message):
        sg.compile(dit, executable.plan, inputs(), **options)


def test_readable_source_of_a_step(executable):
    assert "slot_transformer_blocks_0_attn1" in executable.print_readable(1)
    assert "slot_" not in executable.print_readable(0)
    for step in (-1, 4):
        with pytest.raises(sg.PlanError, match="the plan has steps 0 to 3"):
            executable.print_readable(step)


@pytest.mark.slow
def test_inductor(dit, ddim):
    """Compiled code rounds differently, but not much; and a caller may write to what it gets and gave."""
    plan = sg.make_plan("manual", model=dit, scheduler=ddim, steps=4, actions={"ff": "CRCC", "hidden": "CCCR"})
    fast = sg.compile(dit, plan, inputs(1), backend="inductor")
    exact = sg.compile(dit, plan, inputs(1), backend="eager", exact=True)
    wanted, got = (sg.sample(exe, ddim, noise(), **labels(7)) for exe in (exact, fast))
    assert error(got, wanted) <= SAME_RUN
    session, reference = fast.session(), exact.session()
    for seed in range(4):
        given = inputs(seed=seed)
        expected = reference(**inputs(seed=seed)).sample
        result = session(**given).sample
        assert error(result, expected) <= SAME_RUN
        result.fill_(float("nan"))
        for value in given.values():
            value.zero_()
    assert session.peak_slot_bytes == fast.memory().peak_slot_bytes
    assert session.slot_bytes == 0
    full = sg.compile(dit, sg.make_plan("full", model=dit, scheduler=ddim, steps=4), inputs(1), backend="inductor")
    eager = sg.sample(dit, ddim, noise(), steps=4, **labels(7))
    assert error(sg.sample(full, ddim, noise(), **labels(7)), eager) <= SAME_RUN
