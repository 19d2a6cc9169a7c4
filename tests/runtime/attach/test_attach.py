"""Attached to a diffusers pipeline: the oracle's images, clear refusals, and nothing that leaks between calls."""

import copy

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.oracle import Oracle, run_loop
from helpers.pipes import STEPS, images, oracle_images
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.errors import CompileError, PlanError
from stepgraph.runtime.session.session import Session

ACTIONS = {"attn": "CRCR", "ff": "CRRR", "hidden": "CCCR"}


def compiled(pipe, actions=ACTIONS, rows: int = 2) -> sg.Executable:
    plan = sg.make_plan("manual", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS, actions=actions)
    return sg.compile(pipe.transformer, plan, inputs(rows), backend="eager", exact=True)


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler"])
def test_images_are_those_of_the_oracle(pipe, name):
    pipe.scheduler = tiny_scheduler(name)
    exe = compiled(pipe)
    cases = [
        {"batch": batch, "guidance_scale": scale, "seed": seed}
        for seed, (batch, scale) in enumerate([(1, 4.0), (1, 1.0), (3, 4.0), (3, 1.0), (1, 4.0)])
    ]
    wanted = [oracle_images(pipe, exe.plan, **case) for case in cases]
    eager = images(pipe, **cases[0])
    exe.attach(pipe)
    for case, expected in zip(cases, wanted, strict=True):
        assert torch.equal(images(pipe, **case), expected), case
    assert not torch.equal(wanted[0], eager)
    # One program per batch size of the transformer's input: 1, 2, 3 and 6.
    assert {program.batch for program in exe._programs.values()} == {1, 2, 3, 6}


def test_an_all_compute_plan_gives_the_eager_images(pipe):
    eager = images(pipe, batch=3)
    compiled(pipe, {}).attach(pipe)
    assert torch.equal(images(pipe, batch=3), eager)


def test_detach_leaves_no_trace(pipe):
    eager, transformer = images(pipe), pipe.transformer
    exe = compiled(pipe).attach(pipe)
    assert "forward" in transformer.__dict__
    images(pipe)
    exe.detach()
    assert "forward" not in transformer.__dict__
    assert torch.equal(images(pipe), eager)
    exe.detach()
    exe.attach(pipe)
    exe.detach()
    assert torch.equal(images(pipe), eager)


def test_a_forward_of_the_users_own_is_put_back(pipe):
    own = pipe.transformer.forward
    pipe.transformer.forward = own
    exe = compiled(pipe).attach(pipe)
    exe.detach()
    assert pipe.transformer.__dict__["forward"] is own


# -- refusals ------------------------------------------------------------------------------------------------------------


def test_attaching_twice_is_refused(pipe):
    exe = compiled(pipe).attach(pipe)
    for other in (exe, compiled(pipe)):
        with pytest.raises(sg.CompileError, match="already has an executable attached; detach that one first"):
            other.attach(pipe)


def test_a_pipeline_without_or_with_another_transformer_is_refused(pipe):
    exe = compiled(pipe)

    class Unet:
        """A pipeline of another kind."""

    with pytest.raises(sg.CompileError, match="Unet has no transformer to attach to"):
        exe.attach(Unet())
    with pytest.raises(sg.CompileError, match="Unet has no transformer to accelerate"):
        sg.accelerate(Unet())
    # Other weights are followed by a plan that measured nothing.
    other = diffusers.DiTPipeline(tiny_dit(seed=4), pipe.vae, pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    wanted = oracle_images(other, exe.plan)
    exe.attach(other)
    assert torch.equal(images(other), wanted)
    exe.detach()
    # So are the same weights in another object, which then are its own.
    twin = diffusers.DiTPipeline(copy.deepcopy(pipe.transformer), pipe.vae, pipe.scheduler)
    twin.set_progress_bar_config(disable=True)
    wanted = oracle_images(pipe, exe.plan)
    exe.attach(twin)
    assert torch.equal(images(twin), wanted)
    twin.transformer.proj_out_2.weight.data.mul_(2)
    changed = images(twin)
    exe.detach()
    assert torch.equal(changed, oracle_images(twin, exe.plan))


REFUSED = {
    "steps": (lambda pipe: None, 6, r"compiled for 4 inference steps \(4 evaluations\).*is set to 6 evaluations"),
    "scheduler": (
        lambda pipe: setattr(pipe, "scheduler", tiny_scheduler("euler")), STEPS,
        "compiled for DDIMScheduler, but the pipeline's scheduler has EulerDiscreteScheduler",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_another_schedule_is_refused_and_leaves_the_executable_usable(pipe, case):
    change, steps, message = REFUSED[case]
    exe, scheduler = compiled(pipe), pipe.scheduler
    wanted = oracle_images(pipe, exe.plan)
    exe.attach(pipe)
    change(pipe)
    with pytest.raises(PlanError, match=message):
        images(pipe, steps=steps)
    pipe.scheduler = scheduler
    assert torch.equal(images(pipe), wanted)


# The pipeline's scheduler and another of its class.
REPLACED = {
    "ddim, other betas": ("ddim", {"beta_schedule": "scaled_linear"}),
    "ddim, other spacing": ("ddim", {"timestep_spacing": "trailing"}),
    "ddim, another prediction": ("ddim", {"prediction_type": "v_prediction"}),
    "euler, karras": ("euler", {"use_karras_sigmas": True}),
}


@pytest.mark.parametrize("case", REPLACED)
def test_a_plan_that_measured_nothing_takes_over_a_replaced_scheduler_s_schedule(pipe, case):
    name, changes = REPLACED[case]
    pipe.scheduler = tiny_scheduler(name)
    former, other = pipe.scheduler, type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    exe = compiled(pipe)
    before = oracle_images(pipe, exe.plan)
    pipe.scheduler = other
    wanted = oracle_images(pipe, exe.plan)
    pipe.scheduler = former
    exe.attach(pipe)
    assert torch.equal(images(pipe), before)
    pipe.scheduler = other
    assert torch.equal(images(pipe), wanted)
    assert not torch.equal(wanted, before)
    pipe.scheduler = former
    assert torch.equal(images(pipe), before)
    exe.detach()
    # Without a pipeline: the loop, and a session in a loop of one's own.
    oracle = Oracle.of(pipe.transformer, exe.plan)
    expected, _ = run_loop(oracle, other, noise(2), STEPS, cond=labels(1, 2))
    assert torch.equal(sg.sample(exe, other, noise(2), **labels(1, 2)), expected)
    assert torch.equal(run_loop(exe.session(), other, noise(2), STEPS, cond=labels(1, 2))[0], expected)


def test_a_calibrated_plan_refuses_a_replaced_scheduler(pipe):
    exe = compiled(pipe)
    plan = exe.plan.with_header(measured="choice")
    exe = sg.compile(pipe.transformer, plan, inputs(2), backend="eager", exact=True).attach(pipe)
    wanted, former = images(pipe), pipe.scheduler
    pipe.scheduler = diffusers.DDIMScheduler(beta_end=0.05)
    with pytest.raises(PlanError, match="compiled for another configuration of DDIMScheduler"):
        images(pipe)
    pipe.scheduler = former
    assert torch.equal(images(pipe), wanted)


def test_timesteps_out_of_order_are_refused(pipe):
    exe = compiled(pipe).attach(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    first, second, third, _ = (int(t) for t in pipe.scheduler.timesteps)
    with pytest.raises(
        PlanError, match=f"the plan begins at timestep {first}, but the pipeline's first call asks for {second + 1}"
    ):
        pipe.transformer(**inputs(1, timestep=second + 1))
    pipe.transformer(**inputs(1, timestep=first))
    with pytest.raises(
        PlanError, match=f"step 1 of the plan is at timestep {second}, but the pipeline asks for timestep {third}"
    ):
        pipe.transformer(**inputs(1, timestep=third))
    assert pipe.transformer.forward.session.slot_bytes == 0
    assert exe.plan.header.timesteps[0] == first


# -- nothing leaks ---------------------------------------------------------------------------------------------------------


class StopError(Exception):
    """Raised by the tests in the middle of a run."""


def raise_at(target, attribute: str, call: int, monkeypatch) -> None:
    """Let the n-th call of a method raise, once."""
    original, calls = getattr(target, attribute), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call + 1:
            raise StopError
        return original(*args, **kwargs)

    monkeypatch.setattr(target, attribute, wrapped)


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("place", ["scheduler", "between", "session"])
def test_after_an_exception_the_next_run_is_a_fresh_one(pipe, monkeypatch, step, place):
    exe = compiled(pipe)
    wanted = oracle_images(pipe, exe.plan, seed=1)
    exe.attach(pipe)
    images(pipe, seed=5)
    owner, method = {
        "scheduler": (pipe.scheduler, "step"),
        "between": (pipe.scheduler, "scale_model_input"),
        "session": (Session, "_call"),
    }[place]
    with monkeypatch.context() as patch:
        raise_at(owner, method, step, patch)
        with pytest.raises(StopError):
            images(pipe, seed=7)
    if place == "session":
        assert (pipe.transformer.forward.session.step, pipe.transformer.forward.session.slot_bytes) == (0, 0)
    assert torch.equal(images(pipe, seed=1), wanted)


def test_an_aborted_run_of_another_batch_size_does_not_matter(pipe, monkeypatch):
    exe = compiled(pipe)
    wanted = oracle_images(pipe, exe.plan, batch=3)
    exe.attach(pipe)
    with monkeypatch.context() as patch:
        raise_at(pipe.scheduler, "step", 1, patch)
        with pytest.raises(StopError):
            images(pipe, batch=1)
    assert torch.equal(images(pipe, batch=3), wanted)


def test_two_pipelines_of_one_executable_do_not_share_values(pipe):
    exe = compiled(pipe)
    twin = diffusers.DiTPipeline(copy.deepcopy(pipe.transformer), pipe.vae, copy.deepcopy(pipe.scheduler))
    wanted = [oracle_images(pipe, exe.plan, seed=seed) for seed in (0, 1)]
    exe.attach(pipe).attach(twin)
    pipe.scheduler.set_timesteps(STEPS)
    # A run of the first pipeline is begun and not finished while the other one runs.
    pipe.transformer(**inputs(1, timestep=int(pipe.scheduler.timesteps[0])))
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(images(twin, seed=1), wanted[1])
    assert torch.equal(images(pipe, seed=0), wanted[0])
    exe.detach()
    assert all("forward" not in p.transformer.__dict__ for p in (pipe, twin))


@pytest.mark.parametrize("given_up_after", [0, 1, 2, 3])
def test_two_calls_a_step(pipe, given_up_after):
    """Guidance in two calls: branches are told apart, also after a run that was given up between two of them."""
    arguments = {"guidance": "separate", "actions": {"ff": "CRCR", "hidden": "CCCR"}}
    plan = sg.make_plan("manual", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS, **arguments)
    run = (pipe.scheduler, noise(), STEPS, 4.0, labels(3), labels(NULL_CLASS), True)
    wanted, _ = run_loop(Oracle.of(pipe.transformer, plan), *run)
    exe = sg.compile(pipe.transformer, plan, inputs(), backend="eager", exact=True).attach(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    for call in range(given_up_after):
        timestep = int(pipe.scheduler.timesteps[call // 2])
        pipe.transformer(**inputs(seed=9 + call // 2, timestep=timestep) | labels(NULL_CLASS if call % 2 else 5))
    assert torch.equal(run_loop(pipe.transformer, *run)[0], wanted)
    assert torch.equal(run_loop(pipe.transformer, *run)[0], wanted)
    exe.detach()


def test_accelerate(pipe):
    eager = images(pipe)
    exe = sg.accelerate(pipe, STEPS, "interval", backend="eager", exact=True, every=2)
    fast = images(pipe)
    assert exe.plan.header.policy == "interval"
    exe.detach()
    assert torch.equal(oracle_images(pipe, exe.plan), fast)
    assert not torch.equal(fast, eager)


def test_accelerate_calibrates_once_and_keeps_what_it_made(pipe, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("STEPGRAPH_CACHE", str(tmp_path / "kept"))
    common = {"samples": 2, "seed": 3, "backend": "eager", "exact": True}
    measured: list[int] = []

    def run(policy="smoothcache", **arguments):
        measured.clear()
        exe = sg.accelerate(pipe, STEPS, policy, on_step=lambda done, total: measured.append(done), **common | arguments)
        result = images(pipe)
        exe.detach()
        return exe.plan, result

    plan, fast = run(alpha=0.4)
    assert measured[-1] == 2 * STEPS
    stats = sg.calibrate(pipe.transformer, pipe.scheduler, steps=STEPS, samples=2, seed=3)
    assert plan.rows == sg.make_plan("smoothcache", stats, alpha=0.4).rows
    assert torch.equal(oracle_images(pipe, plan), fast)
    again, same = run(alpha=0.4)
    assert (measured, again) == ([], plan)
    assert torch.equal(same, fast)
    # Another plan of the same statistics, and a second measurement for InvarDiff's phase 2.
    other, _ = run(alpha=9.0)
    assert measured == []
    assert other.rows != plan.rows
    run("invardiff", step=0.0, attn=0.9, ff=0.9)
    assert measured[-1] == 2 * STEPS
    assert {path.name.split("-")[0] for path in (tmp_path / "kept").iterdir()} == {"stats", "plan"}
    assert len(list((tmp_path / "kept").glob("stats-*"))) == 1
    # Other circumstances are measured anew.
    run(alpha=0.4, seed=4)
    assert measured
    for path in (tmp_path / "kept").glob("plan-smoothcache-*"):
        path.write_text("{")
    with caplog.at_level("WARNING", logger="stepgraph"):
        healed, _ = run(alpha=0.4)
    assert "it is made anew" in caplog.text
    assert healed == plan
    with pytest.raises(sg.PlanError, match="unknown policy 'nose'"):
        run("nose")


def test_accelerate_hands_on_what_the_calibration_is_asked_for_or_refuses_it(pipe, monkeypatch):
    # The rule lands on states, which a sampler that clips cannot be made to do.
    monkeypatch.setattr(pipe, "scheduler", diffusers.DDIMScheduler(clip_sample=False))
    common = {"backend": "eager", "exact": True}
    runs = {"guidance_scale": 3.0, "samples": 2, "seed": 5}
    exe = sg.accelerate(pipe, STEPS, "whole-step", **common, **runs)
    exe.detach()
    skipped = sg.make_plan("interval", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS, every=2, kinds=["output"])
    fitted = sg.fit_whole_step(skipped, pipe.transformer, pipe.scheduler, **runs)
    assert exe.plan.forecasts == fitted.forecasts
    assert {name: exe.plan.header.arguments[name] for name in runs} == runs
    # What is kept is found again for the same runs only.
    sg.accelerate(pipe, STEPS, "whole-step", **common, **runs | {"seed": 6}).detach()
    other = sg.accelerate(
        pipe,
        STEPS,
        "whole-step",
        conditioning=labels(7, 8) | {"negative_class_labels": torch.full((2,), NULL_CLASS)},
        **common,
        **runs,
    )
    other.detach()
    assert other.plan.forecasts != fitted.forecasts
    for name, value in runs.items():
        with pytest.raises(sg.PlanError, match=rf"{name}={value} has no effect: the policy 'interval' runs nothing with it"):
            sg.accelerate(pipe, STEPS, "interval", **common, **{name: value})
    with pytest.raises(sg.PlanError, match="samples=2 has no effect: the policy 'l2c'"):
        sg.accelerate(pipe, STEPS, "l2c", samples=2, **common)
    with pytest.raises(sg.PlanError, match="'samples' is given twice"):
        sg.accelerate(pipe, STEPS, "whole-step", {"samples": 3}, samples=2, **common)


def test_accelerate_looks_into_files_and_at_the_sampler(pipe, tmp_path):
    def reused(logit: float) -> int:
        header = sg.make_plan("full", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS, guidance="none")
        sites = tuple(site for site in header.sites if site.kind in ("attn", "ff"))
        sg.Router(header.header, sites, torch.full((STEPS, len(sites)), logit)).save(tmp_path / "router.safetensors")
        exe = sg.accelerate(pipe, STEPS, "l2c", router=str(tmp_path / "router.safetensors"), backend="eager")
        exe.detach()
        return sum(row.count("R") for row in exe.plan.rows)

    assert reused(-4.0) > 0
    assert reused(4.0) == 0
    deterministic, pipe.scheduler = pipe.scheduler, diffusers.DDPMScheduler()
    try:
        sg.accelerate(pipe, STEPS, "interval", backend="eager", allow_stochastic=True).detach()
        with pytest.raises(sg.PlanError, match="DDPMScheduler is stochastic"):
            sg.accelerate(pipe, STEPS, "interval", backend="eager")
    finally:
        pipe.scheduler = deterministic
    with pytest.raises(sg.PlanError, match="'every' is given twice"):
        sg.accelerate(pipe, STEPS, "interval", {"every": 2}, every=3)
    exe = sg.accelerate(pipe, STEPS, "interval", {"every": 3}, backend="eager")
    exe.detach()
    assert exe.plan.header.arguments["every"] == 3


def test_an_attached_model_can_be_compiled_again(pipe):
    exe = compiled(pipe).attach(pipe)
    again = compiled(pipe, {})
    exe.detach()
    eager = images(pipe)
    again.attach(pipe)
    assert torch.equal(images(pipe), eager)


def test_equal_conditioning_in_both_calls_is_no_restart(pipe):
    model, scheduler = pipe.transformer, pipe.scheduler
    plan = sg.make_plan(
        "manual", model=model, scheduler=scheduler, steps=STEPS, guidance="separate", actions={"ff": "CRCR", "hidden": "CCCR"}
    )
    exe = sg.compile(model, plan, inputs(), backend="eager", exact=True)
    oracle = Oracle.of(model, plan)
    scheduler.set_timesteps(STEPS)
    calls = [inputs(seed=step, timestep=int(t)) for step, t in enumerate(scheduler.timesteps) for _ in range(2)]
    wanted = [oracle(**given).sample for given in calls]
    exe.attach(pipe)
    for run in range(2):
        # A pipeline sets the timesteps for every run; the second run here follows one given up after its first call.
        scheduler.set_timesteps(STEPS)
        if run == 1:
            model(**calls[0])
            scheduler.set_timesteps(STEPS)
        for given, expected in zip(calls, wanted, strict=True):
            assert torch.equal(model(**given).sample, expected)
    exe.detach()


def test_detach_does_not_take_away_what_was_put_over_it(pipe):
    exe = compiled(pipe).attach(pipe)
    attached = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: attached(*args, **kwargs)
    with pytest.raises(CompileError, match="undo that first, then detach"):
        exe.detach()
    pipe.transformer.forward = attached
    exe.detach()
    assert "forward" not in pipe.transformer.__dict__
